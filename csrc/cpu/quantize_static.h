#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// codes [rows, n + tail] of x, see fastdiff/ops/quantize_static.py; rows of x are `stride` elements apart, and `share`
// consecutive rows have one scale and one offset.
struct StaticCodes {
  int8_t* codes;
  const void* x;
  int type;
  int64_t rows, n, stride, tail;
  const float *scale, *offset;  // offset may be null
  int64_t share;
};

FASTDIFF_KERNEL(quantize_static, (const StaticCodes& a), a)

}  // namespace fastdiff
