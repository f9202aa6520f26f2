#pragma once
#include "cuda/launch.h"

namespace fastdiff {

// The arguments of fastdiff/ops/philox_normal.py.
struct PhiloxNormal {
  float* out;  // [rows, n]
  const int64_t* seed;
  const int32_t *step, *stream;
  int64_t rows, n;
};

void philox_normal_cuda(const PhiloxNormal& task, Queue queue);

}  // namespace fastdiff
