// Runs tasks on torch's own OpenMP threads.
#pragma once
#include <cstdint>

namespace fastdiff {

// Calls run(context, begin, end) on ranges that cover [0, tasks), and returns when all are done. Uses torch's threads
// and thread count; one thread when `serial`, in a forked child, or where torch has no OpenMP. `run` must not throw.
void parallel(int64_t tasks, bool serial, void (*run)(void* context, int64_t begin, int64_t end), void* context);

// How many ranges parallel() makes of many tasks.
int64_t parallel_threads();

// Where the threads come from: "torch's OpenMP", "OpenMP" or "one thread".
const char* parallel_runtime();

template <class F>
inline void parallel_for(int64_t tasks, bool serial, F& body) {
  parallel(
      tasks, serial, [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); }, &body);
}

}  // namespace fastdiff
