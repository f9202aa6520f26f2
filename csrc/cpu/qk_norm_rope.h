#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

constexpr int64_t kMaxHeadDim = 1024;

// The arguments of fastdiff/ops/qk_norm_rope.py; strides in elements, the elements of a head lie one after another.
struct QkNormRope {
  struct Rows {  // data may be null
    const void* data;
    int type;
    int64_t stride_b, stride_n, stride_h;
  };
  Rows x, weight, cosine, sine;
  void* out;  // [batch, tokens, heads, dim], contiguous
  int out_type;
  int64_t batch, tokens, heads, dim;
  float eps;
  bool normalizes, interleaved;
};

FASTDIFF_KERNEL(qk_norm_rope, (const QkNormRope& task), task)

}  // namespace fastdiff
