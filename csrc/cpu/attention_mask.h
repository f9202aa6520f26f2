// Masks of attention: scores become score * factor + mask, in units of log2.
#pragma once
#include "cpu/attention_tile.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

FASTDIFF_ALWAYS float mask_value(const char* mask, int64_t index, int type) {
  if (type == kBoolMask) return mask[index] ? 0.0f : -__builtin_inff();
  if (type == kFloat32) return ((const float*)mask)[index];
  alignas(64) uint16_t part[2 * kFloats] = {((const uint16_t*)mask)[index]};
  return load_float(part, type)[0];
}

// n <= kFloats values of one query, zeros after them
static F32 load_mask(const char* mask, int64_t stride, int64_t n, int type) {
  if (type != kBoolMask && stride == 1) return load_some(mask, n, type);
  alignas(64) float part[kFloats] = {};
  for (int64_t i = 0; i < n && i < kFloats; ++i) part[i] = mask_value(mask, i * stride, type);
  return load<F32>(part);
}

FASTDIFF_ALWAYS const char* mask_at(const Attention& t, int64_t b, int64_t head, int64_t query, int64_t key) {
  const int64_t index = b * t.mask_stride[0] + head * t.mask_stride[1] + query * t.mask_stride[2] + key * t.mask_stride[3];
  return (const char*)t.mask + index * (t.mask_type == kBoolMask ? 1 : size_of(t.mask_type));
}

// NaN stays.
FASTDIFF_ALWAYS F32 largest(F32 most, F32 x) {
  const F32 next = larger(most, x);  // x where one is NaN
  return most == most ? next : most;
}

template <int NV>
static void mask_block(const Attention& t, int64_t b, int64_t head, int64_t q0, int64_t first, int64_t count, float* scores, const F32 (&factor)[NV], F32 (&most)[NV]) {
  for (int j = 0; j < NV; ++j) {
    most[j] = splat(-__builtin_inff());
    for (int64_t i = 0; i < count; i += kFloats) {
      const int64_t n = count - i < kFloats ? count - i : kFloats;
      U32 rows[kFloats];
      for (int r = 0; r < kFloats; ++r) {
        const int64_t query = q0 + j * kFloats + r;
        if (query >= t.queries || (r > 0 && t.mask_stride[2] == 0)) {
          rows[r] = U32{};
        } else {
          rows[r] = (U32)load_mask(mask_at(t, b, head, query, first + i), t.mask_stride[3], n, t.mask_type);
        }
      }
      if (t.mask_stride[2] == 0) {
        for (int r = kFloats - 1; r >= 0; --r) rows[r] = (U32)splat(((F32)rows[0])[r]);
      } else {
        transpose(rows);
      }
      for (int64_t r = 0; r < n; ++r) {
        float* at = scores + ((i + r) * NV + j) * kFloats;
        const F32 x = fused(load<F32>(at), factor[j], (F32)rows[r] * kLog2E);
        store(at, x);
        most[j] = largest(most[j], x);
      }
    }
  }
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
