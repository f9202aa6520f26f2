#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// The arguments of fastdiff/ops/norm_modulate.py and of the two contracts made of it, on rows [batch, tokens, channels].
struct NormModulate {
  struct Rows {  // strides in elements; channels lie one after another
    const void* data;
    int type;
    int64_t stride_b, stride_n;
  };
  struct Vector {  // one per sample, or the same for all with stride 0; data may be null
    const void* data;
    int type;
    int64_t stride;
  };
  Rows x;
  Rows y;         // data may be null: then nothing is added
  void* sum;      // x + gate * y in x's type, contiguous; used with y only
  Vector gate, weight, bias, scale, shift;
  void* out;      // contiguous
  int out_type;   // int8: codes of rows with a scale each
  float* scales;  // [batch, tokens], for int8 only
  int64_t batch, tokens, channels;
  float eps;
  bool centred;   // layer norm; else root mean square norm
};

FASTDIFF_KERNEL(norm_modulate, (const NormModulate& task), task)

}  // namespace fastdiff
