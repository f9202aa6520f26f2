// `philox_normal`: contract in fastdiff/ops/philox_normal.py. Compile with -fmad=false.
#include "cuda/device.h"
#include "cuda/element.cuh"

namespace fastdiff {

namespace {

constexpr int kThreads = 256;

// A thread makes the four normals of one Philox block. kAligned: every row starts at a multiple of 16 bytes.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows,
                         int64_t n) {
  const int64_t quads = (n + 3) / 4, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    for (int64_t quad = first; quad < quads; quad += int64_t(gridDim.x) * kThreads) {
      float z[4];
      philox_normal4<Scalar>(uint64_t(seed[row]), uint32_t(step[row]), uint32_t(stream[row]), uint32_t(quad),
                             uint32_t(quad >> 32), z);
      float* target = out + row * n + 4 * quad;
      if constexpr (kAligned) {
        store_four(target, z);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (4 * quad + k < n) target[k] = z[k];
      }
    }
  }
}

}  // namespace

void philox_normal_cuda(float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows,
                        int64_t n, Queue queue) {
  if (rows == 0 || n == 0) return;
  const OnDevice device(queue.device);
  const bool aligned = n % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const auto kernel = aligned ? philox_normal_kernel<true> : philox_normal_kernel<false>;
  const dim3 grid = grid_of((n + 4 * kThreads - 1) / (4 * kThreads), rows);
  kernel<<<grid, kThreads, 0, stream_of(queue)>>>(out, seed, step, stream, rows, n);
  expect_launched("philox_normal", {rows, n});
}

}  // namespace fastdiff
