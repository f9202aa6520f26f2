// What happens to the sums of a matrix product before they are stored; epilogue_tile.h does it.
#pragma once
#include <cstdint>

namespace fastdiff {

// The last three take pairs: panel 2p holds values, panel 2p + 1 their gates, and both make 16 columns of the result.
enum Activation : int { kLinear = 0, kGelu, kGeluTanh, kSilu, kGeglu, kGegluTanh, kSwiglu };

constexpr bool takes_pairs(int activation) { return activation >= kGeglu; }

// In float32 and in this order: y = sum * row_scale[r] * column_scale[n] + bias[n] + shift[r / rows_per_shift][n];
// activation; * gate[r / rows_per_gate][n]; + residual[r][n]; cast, or int8 codes of y / out_scale. Null means absent.
// Columns of scales, bias and shift are those of the sums (for pairs whole panels, values and gates in turn); those of
// gate, residual and out are those of the result. Strides in elements; rows of one tensor are `stride` apart.
struct Epilogue {
  int64_t columns;  // of the result
  int activation;
  const float* row_scale;
  int64_t row_scale_stride;  // 0: one scale for all
  const float* column_scale;
  const float* bias;
  const float* shift;
  int64_t shift_stride, rows_per_shift;
  const void* gate;
  int64_t gate_stride, rows_per_gate;
  int gate_type;
  const void* residual;
  int64_t residual_stride;
  int residual_type;
  void* out;
  int64_t out_stride;
  int out_type;
  const float* out_scale;  // one, for int8
};

}  // namespace fastdiff
