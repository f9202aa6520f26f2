#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

constexpr int kMaxOperands = 8, kMaxProducts = kMaxOperands * (kMaxOperands + 1) / 2 + kMaxOperands;
constexpr int64_t kGramChunk = 16384;  // elements whose total is one partial result

// The arguments of fastdiff/ops/gram.py; operands are seen as [batch, channels, elements].
struct Gram {
  struct Operand {
    const void* data;
    int64_t stride[3];
    int type;
  };
  int count;
  Operand operand[kMaxOperands];
  int64_t batch, channels, elements;
  double* out;      // [batch, count, count + 1]
  double* partial;  // scratch: [batch, ceil(channels * elements / kGramChunk), kMaxProducts]
};

FASTDIFF_KERNEL(gram, (const Gram& task), task)

}  // namespace fastdiff
