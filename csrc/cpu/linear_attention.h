#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// The arguments of fastdiff/ops/linear_attention.py on [batch, tokens, heads, dim]; out is contiguous.
struct LinearAttention {
  struct Heads {  // strides in elements; the elements of a head lie one after another
    const void* data;
    int64_t stride_b, stride_n, stride_h;
  };
  Heads q, k, v;
  void* out;
  int type;  // of all four
  int64_t batch, queries, keys, heads, dim;
  float eps;
};

FASTDIFF_KERNEL(linear_attention, (const LinearAttention& task), task)

}  // namespace fastdiff
