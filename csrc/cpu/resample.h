#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// x [batch, height, width, channels] contiguous to [batch, 2 height, 2 width, channels] (each pixel four times) or, where
// `average`, to [batch, height / 2, width / 2, channels] (the mean of four).
struct Resample {
  const void* x;
  void* out;
  int type;
  bool average;
  int64_t batch, height, width, channels;
};

FASTDIFF_KERNEL(resample, (const Resample& task), task)

}  // namespace fastdiff
