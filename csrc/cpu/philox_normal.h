#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// out [rows, n] float32, see fastdiff/ops/philox_normal.py; elements first .. first + n of each row's sequence.
FASTDIFF_KERNEL(philox_normal,
                (float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows, int64_t row_stride,
                 int64_t first, int64_t n),
                out, seed, step, stream, rows, row_stride, first, n)

}  // namespace fastdiff
