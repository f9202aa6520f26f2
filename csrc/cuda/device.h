// Selects the device of a pointer and turns launch errors into exceptions.
#pragma once
#include <cuda_runtime.h>

#include <string>

namespace fastdiff {

// The device that owns `pointer` is current while this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const void* pointer);
  ~OnDeviceOf();
  OnDeviceOf(const OnDeviceOf&) = delete;

 private:
  int before_ = -1;
};

// Throws std::runtime_error naming the kernel, its sizes and the architecture when the launch before it failed.
void expect_launched(const char* kernel, const std::string& sizes);

}  // namespace fastdiff
