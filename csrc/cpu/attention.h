#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

enum AttentionPrecision : int { kAttentionFloat = 0, kAttentionBrain = 1, kAttentionCodes = 2 };

constexpr int64_t kAttentionDim = 1024;  // largest head dimension: tiles of it lie on the stack
constexpr int kNoMask = -1, kBoolMask = -2;  // in place of the type of a float mask

// The arguments of fastdiff/ops/attention.py. Strides are in elements; the head dimension is contiguous.
struct Attention {
  struct Operand {
    const void* data;
    int64_t batch, token, head;  // strides
  };
  Operand q, k, v;
  int type;  // of q, k, v and out
  int64_t batch, queries, keys, heads, key_heads, dim;
  const void* mask;
  int mask_type;           // kNoMask, kBoolMask or the type of what is added
  int64_t mask_stride[4];  // batch, head, query, key; 0 where it is broadcast
  const int32_t* lengths;  // keys of each sample, or null
  float scale;
  int precision;
  void* out;   // [batch, queries, heads, dim]
  float* lse;  // [batch, heads, queries], or null
};

FASTDIFF_KERNEL(attention, (const Attention& task), task)

}  // namespace fastdiff
