#include "cuda/device.h"

#include <stdexcept>

#include "cuda/launch.h"

namespace fastdiff {

namespace {

__global__ void probe_kernel() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string architecture() {
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess)
    return "an unknown device";
  return std::string(properties.name) + " (sm_" + std::to_string(10 * properties.major + properties.minor) + ")";
}

}  // namespace

OnDevice::OnDevice(int device) {
  int current = 0;
  if (cudaGetDevice(&current) == cudaSuccess && current != device && cudaSetDevice(device) == cudaSuccess)
    before_ = current;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

void expect_launched(const char* kernel, std::initializer_list<int64_t> sizes) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string shape;
  for (int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  throw std::runtime_error(std::string(kernel) + ": launch failed for [" + shape + "] on " + architecture() + ": " +
                           cudaGetErrorString(error));
}

std::string unusable() {
  int driver = 0, runtime = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is loaded";
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 < runtime / 1000)
    return "the driver serves CUDA " + version(driver) + ", the kernels need " + version(runtime) +
           "; update the driver or force the triton backend";
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    cudaGetLastError();
    return "the driver shows no CUDA device";
  }
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return "the kernels were not compiled for " + architecture() + " (" + cudaGetErrorString(error) +
         "); force the triton backend";
}

}  // namespace fastdiff
