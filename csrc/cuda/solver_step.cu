#include "cuda/solver_step.cuh"

#include <algorithm>

#include "cuda/device.h"

namespace fastdiff {

constexpr int kThreads = 128;
constexpr int64_t kTurns = 4;         // times four elements per thread of a big problem: the table is read once for all
constexpr int64_t kManyBlocks = 2048;  // 16 for each of 132 multiprocessors

// Blocks that read the tick say so; the last one sets the next. atomicInc wraps to zero by itself, so a replayed graph
// finds the ticket as the first launch did.
class Ticket {
 public:
  __device__ Ticket(const SolverStep& step, int32_t line) : step_(step), line_(line) {
    if (threadIdx.x != 0) return;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");  // the tick was read before this block counts as arrived
    last_ = gridDim.x * gridDim.y - 1;
    arrived_ = atomicInc(step.ticket, last_);
  }
  // Late, so that nobody waits for the counter.
  __device__ void finish() const {
    if (threadIdx.x == 0 && arrived_ == last_ && line_ >= 0 && line_ < step_.lines) *step_.tick = line_ + 1;
  }

 private:
  const SolverStep& step_;
  int32_t line_;
  unsigned arrived_, last_;
};

template <class T, bool kFlat>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 2) solver_step_kernel(const __grid_constant__ SolverStep step) {
  __shared__ Head<T> head;
  const int64_t n = step.channels * step.elements, quads = (n + 3) / 4, turn = int64_t(gridDim.x) * kThreads;
  const int32_t line = *static_cast<volatile const int32_t*>(step.tick);
  __syncthreads();
  const Ticket ticket(step, line);
  for (int64_t b = blockIdx.y; b < step.batch; b += gridDim.y) {
    int64_t q = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const T* state = static_cast<const T*>(step.x) + b * n;
    T x[4];
    // the state's address waits for nothing: loading it hides the latency of the table
    if (kFlat && q < quads) load_four(state + 4 * q, x);
    if (threadIdx.x < 32) read_head(step, line, b, int(threadIdx.x), head);
    __syncthreads();
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
  ticket.finish();
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
