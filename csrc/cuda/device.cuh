// The current device for the length of a scope, and errors that say what was launched.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace fastdiff {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = device;
    if (before_ != device) cudaSetDevice(device);
    device_ = device;
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

// Call right after a launch. Nothing waits here: an error of the kernel itself comes up where somebody synchronises.
inline void check_launch(const char* kernel, const std::string& shapes, int device) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  throw std::runtime_error(std::string(kernel) + ": cannot launch for " + shapes + " on device " +
                           std::to_string(device) + " (sm_" + std::to_string(major * 10 + minor) +
                           "): " + cudaGetErrorString(error));
}

inline std::string list(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

// A grid that every GPU takes: kernels go on in steps of the grid where there are more columns or rows.
inline dim3 grid_of(int64_t columns, int64_t rows) {
  return dim3(unsigned(columns < 1 << 30 ? columns : 1 << 30), unsigned(rows < 65535 ? rows : 65535));
}

inline cudaStream_t stream_of(Queue queue) { return static_cast<cudaStream_t>(queue.stream); }

}  // namespace fastdiff
