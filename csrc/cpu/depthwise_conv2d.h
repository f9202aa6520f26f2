#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// The arguments of fastdiff/ops/depthwise_conv2d.py; all contiguous.
struct DepthwiseConv2d {
  const void* x;        // [batch, height, width, channels]
  const float* weight;  // [9, channels]
  const float* bias;    // [channels], or null
  void* out;            // [batch, height, width, channels], half of the channels where gated
  int type, out_type;
  bool gated;
  int64_t batch, height, width, channels;
};

FASTDIFF_KERNEL(depthwise_conv2d, (const DepthwiseConv2d& task), task)

}  // namespace fastdiff
