#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

constexpr int kCopyDims = 6;

// The arguments of fastdiff/ops/copy.py. `out` is contiguous; strides of `in` are in elements. No dimension is 1 or 0
// long, and none continues the one before it; there is at least one.
struct Copy {
  const void* in;
  void* out;
  int in_type, out_type, dims;
  int64_t size[kCopyDims], stride[kCopyDims];
};

FASTDIFF_KERNEL(copy, (const Copy& task), task)

}  // namespace fastdiff
