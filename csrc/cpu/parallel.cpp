#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

namespace fastdiff {
namespace {

bool forked = false;

// The OpenMP entry points that every runtime shares (libgomp, and libomp in its place). Found at run time: linking a
// runtime of our own would start a second pool of threads that fights torch's for the cores.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
  int (*limit)() = nullptr;
  const char* name = "one thread";

  Runtime() {
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    if (load(RTLD_DEFAULT)) {
      name = "torch's OpenMP";
    } else if (void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL)) {
      if (load(library)) name = "OpenMP";
    }
  }

  bool load(void* library) {
    find(library, "omp_get_thread_num", thread);
    find(library, "omp_get_num_threads", threads);
    find(library, "omp_get_max_threads", limit);
    if (!thread || !threads || !limit) return false;
    find(library, "GOMP_parallel", parallel);
    return parallel != nullptr;
  }

  template <class F>
  static void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
  }
};

const Runtime& runtime() {
  static const Runtime found;
  return found;
}

struct Job {
  void (*run)(void*, int64_t, int64_t);
  void* context;
  int64_t tasks;
};

void work(void* data) {
  const Job& job = *static_cast<Job*>(data);
  const int64_t id = runtime().thread(), count = runtime().threads();
  const int64_t begin = job.tasks * id / count, end = job.tasks * (id + 1) / count;
  if (begin < end) job.run(job.context, begin, end);
}

}  // namespace

void parallel(int64_t tasks, bool serial, void (*run)(void*, int64_t, int64_t), void* context) {
  if (tasks <= 0) return;
  const int64_t threads = serial || tasks == 1 ? 1 : parallel_threads();
  if (threads == 1) {
    run(context, 0, tasks);
    return;
  }
  // always torch's full team: a team of another size would make the runtime end and start threads
  Job job{run, context, tasks};
  runtime().parallel(work, &job, unsigned(threads), 0);
}

int64_t parallel_threads() {
  const Runtime& openmp = runtime();
  return forked || openmp.parallel == nullptr ? 1 : openmp.limit();
}

const char* parallel_runtime() { return runtime().name; }

}  // namespace fastdiff
