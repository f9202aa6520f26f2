// `solver_step`: contract in fastdiff/ops/solver_step.py. Compile with -fmad=false.
#include "cuda/solver_step.cuh"

#include <algorithm>

#include "cuda/device.h"

namespace fastdiff {

constexpr int kThreads = 128;
constexpr int64_t kTurns = 4;         // times four elements per thread of a big problem: the table is read once for all
constexpr int64_t kManyBlocks = 2048;  // about 16 for each of 132 multiprocessors

// Blocks that have read the tick say so; the last one sets the next. The counter wraps to zero by itself, so a replayed
// graph finds the ticket as the first launch did. For thread 0 only.
class Ticket {
 public:
  __device__ void arrive(uint32_t* ticket) {
    // atomicInc that lets nothing the block read before slip behind it, and leaves the caches alone as a fence does not
    asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(arrived_)
                 : "l"(__cvta_generic_to_global(ticket)), "r"(gridDim.x * gridDim.y - 1)
                 : "memory");
    is_here_ = true;
  }
  // Late, so that nobody waits for the answer of the counter.
  __device__ void finish(const SolverStep& step, int32_t line) {
    if (!is_here_) arrive(step.ticket);
    if (arrived_ != gridDim.x * gridDim.y - 1 || line < 0 || line >= step.lines) return;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    *step.tick = line + 1;
  }

 private:
  uint32_t arrived_ = 0;
  bool is_here_ = false;
};

template <class T, bool kFlat>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 2)
    solver_step_kernel(const __grid_constant__ SolverStep step) {
  __shared__ Head<T> head;
  const int64_t n = step.channels * step.elements, quads = (n + 3) / 4, turn = int64_t(gridDim.x) * kThreads;
  const bool reads_head = threadIdx.x < 32;
  const int32_t line = reads_head ? *static_cast<volatile const int32_t*>(step.tick) : 0;
  Ticket ticket;
  for (int64_t b = blockIdx.y; b < step.batch; b += gridDim.y) {
    int64_t q = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const T* state = static_cast<const T*>(step.x) + b * n;
    T x[4];
    // the state's address waits for nothing: loading it hides the latency of the table
    if (kFlat && q < quads) load_four(state + 4 * q, x);
    if (reads_head) read_head(step, line, b, int(threadIdx.x), head);
    __syncthreads();
    if (threadIdx.x == 0 && b == blockIdx.y) ticket.arrive(step.ticket);
    if (head.row >= 0) {
      if constexpr (kFlat) {
        while (q < quads) {
          step_four(step, head, b, q, x);
          q += turn;
          if (q < quads) load_four(state + 4 * q, x);
        }
      } else {
        if (step.field) {
          const bool scale = __syncthreads_or(any_scale<T>(step, head.row, threadIdx.x, kThreads));
          if (threadIdx.x == 0) head.scale = scale;
          __syncthreads();
        }
        for (; q < quads; q += turn) step_each(step, head, b, q);
      }
    }
    __syncthreads();  // the head is used until here
  }
  if (threadIdx.x == 0) ticket.finish(step, line);
}

template <class T>
static void launch(const SolverStep& step, Queue queue) {
  const int64_t quads = (step.channels * step.elements + 3) / 4, chunks = std::max<int64_t>((quads + kThreads - 1) / kThreads, 1);
  const int64_t rows = std::max<int64_t>(step.batch, 1), turns = chunks * rows > kManyBlocks ? kTurns : 1;
  const auto kernel = step.flat ? solver_step_kernel<T, true> : solver_step_kernel<T, false>;
  kernel<<<grid_of((chunks + turns - 1) / turns, rows), kThreads, 0, stream_of(queue)>>>(step);
}

void solver_step_cuda(SolverStep step, Queue queue) {
  const OnDevice device(queue.device);
  prepare(step);
  step.state_type == kFloat64 ? launch<double>(step, queue) : launch<float>(step, queue);
  expect_launched("solver_step", {step.batch, step.channels, step.elements});
}

}  // namespace fastdiff
