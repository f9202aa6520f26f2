// Selects a device and turns launch errors into exceptions.
#pragma once
#include <cuda_runtime.h>

#include <initializer_list>

#include "cuda/launch.h"

namespace fastdiff {

// The device is current while this lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// Throws std::runtime_error naming the kernel, its sizes and the architecture when the launch before it failed.
void expect_launched(const char* kernel, std::initializer_list<int64_t> sizes);

// A grid that every GPU takes; kernels go on in steps of the grid where there are more columns or rows.
inline dim3 grid_of(int64_t columns, int64_t rows) {
  return dim3(unsigned(columns < 1 << 30 ? columns : 1 << 30), unsigned(rows < 65535 ? rows : 65535));
}

inline cudaStream_t stream_of(Queue queue) { return static_cast<cudaStream_t>(queue.stream); }

}  // namespace fastdiff
