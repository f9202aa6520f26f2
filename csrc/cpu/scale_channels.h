#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// out [rows, n] = x * factor [n], see fastdiff/ops/scale_channels.py; rows of x are `stride` elements apart.
FASTDIFF_KERNEL(scale_channels,
                (void* out, int out_type, const void* x, int type, int64_t rows, int64_t n, int64_t stride,
                 const float* factor),
                out, out_type, x, type, rows, n, stride, factor)

}  // namespace fastdiff
