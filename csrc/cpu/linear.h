#pragma once
#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/epilogue.h"

namespace fastdiff {

// out = epilogue(x * weight), the arguments of fastdiff/ops/linear*.py; strides in elements, weights packed by packing.py.
struct Linear {
  int64_t rows, inner;  // of x
  const void* x;
  int64_t x_stride;
  int x_type;
  const float* x_scale;    // of int8 codes, or the one scale to quantize floats with; null: a scale per row, found here
  int64_t x_scale_stride;  // 0: one scale for all rows
  const void* weight;
  int weight_type;  // kInt8 also for the bytes of int4
  int64_t panels;
  const float* group_scale;   // int4: [columns, inner / group]
  const int32_t* weight_sum;  // int8: sum of the codes of a column; as long as the epilogue's column_scale
  int64_t sums;               // numbers in weight_sum, column_scale and bias, rows of group_scale
  int64_t group;
  Epilogue epilogue;
};

FASTDIFF_TILE_KERNEL(linear, (const Linear& task), task)
FASTDIFF_TILE_KERNEL(linear_w8a8, (const Linear& task), task)
FASTDIFF_TILE_KERNEL(linear_w8a16, (const Linear& task), task)
FASTDIFF_TILE_KERNEL(linear_w4a16, (const Linear& task), task)
FASTDIFF_TILE_KERNEL(linear_w4a8, (const Linear& task), task)

}  // namespace fastdiff
