#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// codes [rows, n] and scales [rows] of x, see fastdiff/ops/quantize_rows.py; rows of x are `stride` elements apart.
FASTDIFF_KERNEL(quantize_rows,
                (int8_t* codes, float* scales, const void* x, int type, int64_t rows, int64_t n, int64_t stride), codes,
                scales, x, type, rows, n, stride)

}  // namespace fastdiff
