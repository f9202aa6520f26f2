#include "cuda/philox_normal.h"

#include "common/philox.h"
#include "cuda/device.cuh"

namespace fastdiff {

constexpr int kThreads = 256;

// A thread makes the four normals of one Philox block; kAligned: every row starts at a multiple of 16 bytes.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads) philox_normal_kernel(PhiloxNormal task) {
  const int64_t blocks = (task.n + 3) / 4, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t row = blockIdx.y; row < task.rows; row += gridDim.y) {
    const uint64_t seed = uint64_t(task.seed[row]);
    const uint32_t step = uint32_t(task.step[row]), stream = uint32_t(task.stream[row]);
    for (int64_t block = first; block < blocks; block += int64_t(gridDim.x) * kThreads) {
      float z[4];
      philox_normal4<Scalar>(seed, step, stream, uint32_t(block), uint32_t(uint64_t(block) >> 32), z);
      float* out = task.out + row * task.n + 4 * block;
      if constexpr (kAligned) {
        *reinterpret_cast<float4*>(out) = make_float4(z[0], z[1], z[2], z[3]);
      } else {
        const int64_t left = task.n - 4 * block;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < left) out[i] = z[i];
      }
    }
  }
}

void philox_normal_cuda(const PhiloxNormal& task, Queue queue) {
  if (task.rows <= 0 || task.n <= 0) return;
  const DeviceGuard guard(queue.device);
  const bool aligned = task.n % 4 == 0 && reinterpret_cast<uintptr_t>(task.out) % 16 == 0;
  const auto kernel = aligned ? philox_normal_kernel<true> : philox_normal_kernel<false>;
  kernel<<<grid_of((task.n + 4 * kThreads - 1) / (4 * kThreads), task.rows), kThreads, 0, stream_of(queue)>>>(task);
  check_launch("philox_normal", "rows, n = " + list({task.rows, task.n}), queue.device);
}

// Any kernel would do: what is asked is whether the module has code for the device.
std::string unusable() {
  int driver = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "there is no NVIDIA driver; install one that knows CUDA " + std::to_string(CUDART_VERSION / 1000);
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess || devices == 0)
    return std::string("no CUDA device can be used (") + cudaGetErrorString(error) + "); the driver knows CUDA " +
           std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) + ", the kernels need CUDA " +
           std::to_string(CUDART_VERSION / 1000);
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, philox_normal_kernel<true>); error != cudaSuccess)
    return std::string("the CUDA kernels do not run on this GPU (") + cudaGetErrorString(error) +
           "); reinstall with FASTDIFF_CUDA_ARCHS naming its architecture";
  return "";
}

}  // namespace fastdiff
