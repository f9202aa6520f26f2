// `philox_normal`: contract in fastdiff/ops/philox_normal.py. Compile with -fmad=false.
#include "common/philox.h"
#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastdiff {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    philox_normal_kernel(float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows,
                         int64_t n) {
  const int64_t quads = (n + 3) / 4, total = rows * quads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / quads, quad = i - row * quads;
    float z[4];
    philox_normal4<Scalar>(uint64_t(seed[row]), uint32_t(step[row]), uint32_t(stream[row]), uint32_t(quad),
                           uint32_t(quad >> 32), z);
    float* target = out + row * n + 4 * quad;
    if constexpr (kAligned) {
      *reinterpret_cast<float4*>(target) = make_float4(z[0], z[1], z[2], z[3]);
    } else {
      for (int k = 0; k < 4; ++k)
        if (4 * quad + k < n) target[k] = z[k];
    }
  }
}

}  // namespace

void philox_normal_cuda(float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows,
                        int64_t n, void* queue) {
  if (rows == 0 || n == 0) return;
  const OnDeviceOf device(out);
  const int64_t blocks = (rows * ((n + 3) / 4) + kThreads - 1) / kThreads;
  const auto grid = unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  const bool aligned = n % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const auto kernel = aligned ? philox_normal_kernel<true> : philox_normal_kernel<false>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(queue)>>>(out, seed, step, stream, rows, n);
  expect_launched("philox_normal", "[" + std::to_string(rows) + ", " + std::to_string(n) + "]");
}

}  // namespace fastdiff
