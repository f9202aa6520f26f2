#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// The arguments of fastdiff/ops/group_norm.py. Channels of the two inputs follow one another.
struct GroupNorm {
  struct Input {
    const void* data;
    int type;
    int64_t channels;
  };
  struct Vector {  // one per sample, or the same for all with stride 0; data may be null
    const void* data;
    int type;
    int64_t stride;
  };
  Input x[2];  // contiguous; the second may have no channels
  Vector weight, bias, scale, shift;
  const float* out_scale;  // for int8 only
  void* out;
  int out_type;
  int64_t batch, pixels, groups;
  float eps;
  bool silu;
};

// x [batch, pixels, channels]
FASTDIFF_KERNEL(group_norm, (const GroupNorm& task), task)

// x [batch, channels, pixels], one input
FASTDIFF_KERNEL(group_norm_nchw, (const GroupNorm& task), task)

}  // namespace fastdiff
