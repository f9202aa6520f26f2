// The left operand of a linear layer as rows that tiles can read: in place where its type allows, else in scratch memory.
#pragma once
#include "cpu/codes.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kSerialElements = 1 << 13;  // that one thread converts in the time two need to start

// an odd number of cache lines, so that rows do not fall into one set of a cache
FASTDIFF_ALWAYS int64_t scratch_stride(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

FASTDIFF_ALWAYS const char* row_of(const Linear& a, int64_t r) {
  return (const char*)a.x + r * a.x_stride * size_of(a.x_type);
}

template <class Body>
static void for_rows(const Linear& a, Body one) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) one(r);
  };
  parallel_for(a.rows, a.rows * a.inner < kSerialElements, body);
}

// n floats of any type as float32, and zeros up to `padded`
static inline void to_floats(char* to, const char* from, int type, int64_t n) {
  for (int64_t i = 0; i < n; i += kFloats) {
    const F32 v = load_first(from + i * size_of(type), type, n - i);
    memcpy(to + i * 4, &v, size_t(n - i < kFloats ? n - i : kFloats) * 4);
  }
}

// n floats of any type as bfloat16, and a zero after an odd number
static inline void to_brains(char* to, const char* from, int type, int64_t n) {
  const int64_t even = (n + 1) / 2 * 2;
  for (int64_t i = 0; i < n; i += kFloats) {
    const F32 v = load_first(from + i * size_of(type), type, n - i);
    const U16Half half = __builtin_convertvector(to_bfloat16(v), U16Half);
    memcpy(to + i * 2, &half, size_t(even - i < kFloats ? even - i : kFloats) * 2);
  }
}

// Rows of bfloat16 or float32, `multiple` elements at a time.
template <class Kind>
static Rows float_rows(const Linear& a, int64_t multiple) {
  constexpr bool brains = sizeof(Kind) && !__is_same(Kind, Floats);
  const int type = brains ? kBFloat16 : kFloat32;
  const int64_t size = size_of(type), padded = (a.inner + multiple - 1) / multiple * multiple;
  if (a.x_type == type && padded == a.inner) return {(const char*)a.x, a.x_stride * size};
  const int64_t stride = scratch_stride(padded * size);
  char* base = (char*)workspace(0, size_t(a.rows * stride));
  for_rows(a, [&](int64_t r) {
    char* to = base + r * stride;
    brains ? to_brains(to, row_of(a, r), a.x_type, a.inner) : to_floats(to, row_of(a, r), a.x_type, a.inner);
    memset(to + a.inner * size, 0, size_t((padded - a.inner) * size));
  });
  return {base, stride};
}

static inline void shift_codes(char* to, const char* from, int64_t n) {
  int64_t k = 0;
  for (; k + kBytes <= n; k += kBytes) store(to + k, load<Bytes>(from + k) ^ uint8_t(kCodeOffset));
  for (; k < n; ++k) to[k] = char(from[k] ^ kCodeOffset);
}

// Rows of codes plus kOffset, and in `e` the scales that belong to them.
template <int kOffset>
static Rows code_rows(const Linear& a, Epilogue& e, int64_t multiple) {
  const int64_t padded = (a.inner + multiple - 1) / multiple * multiple, stride = scratch_stride(padded);
  e.row_scale = a.x_scale;
  e.row_scale_stride = a.x_scale_stride;
  if (a.x_type == kInt8 && kOffset == 0 && padded == a.inner) return {(const char*)a.x, a.x_stride};
  char* base = (char*)workspace(0, size_t(a.rows * (stride + 4)));
  float* scales = (float*)(base + a.rows * stride);
  if (!a.x_scale) {
    e.row_scale = scales;
    e.row_scale_stride = 1;
  }
  const float fixed = a.x_scale && a.x_type != kInt8 ? 1.0f / *a.x_scale : 0.0f;
  for_rows(a, [&](int64_t r) {
    const char* from = row_of(a, r);
    char* to = base + r * stride;
    if (a.x_type == kInt8) {
      shift_codes(to, from, a.inner);
    } else if (a.x_scale) {
      quantize(to, from, a.x_type, a.inner, fixed, kOffset);
    } else {
      scales[r] = quantize_row(to, from, a.x_type, a.inner, kOffset);
    }
    if (a.inner < padded) memset(to + a.inner, kOffset, size_t(padded - a.inner));
  });
  return {base, stride};
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
