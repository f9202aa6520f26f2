// Rows of floats as int8 codes. Every kernel that quantizes uses these, so that all compute the same bits.
#pragma once
#include "cpu/activation.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

typedef int8_t I8 __attribute__((vector_size(kFloats)));

FASTDIFF_ALWAYS I8 to_codes(F32 v) {
  v = v > 127.0f ? splat(127.0f) : v;
  v = v < -127.0f ? splat(-127.0f) : v;
  return __builtin_convertvector(nearest(v), I8);
}

// the first n elements of a row, then zeros
FASTDIFF_ALWAYS F32 load_first(const char* from, int type, int64_t n) {
  if (n >= kFloats) return load_float(from, type);
  alignas(64) char staged[kBytes] = {};
  memcpy(staged, from, size_t(n * size_of(type)));
  return load_float(staged, type);
}

// The largest magnitude of n elements; the largest of numbers, infinity, NaN is what comes last in this list.
FASTDIFF_ALWAYS float largest(const char* from, int type, int64_t n) {
  I32 most[2] = {};
  for (int64_t i = 0; i < n; i += 2 * kFloats)
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * kFloats;
      if (at >= n) break;
      // magnitudes of floats are ordered like their bits
      const I32 bits = (I32)load_first(from + at * size_of(type), type, n - at) & 0x7fffffff;
      most[k] = bits > most[k] ? bits : most[k];
    }
  most[0] = most[1] > most[0] ? most[1] : most[0];
  int32_t each[kFloats], best = 0;
  store(each, most[0]);
  for (int i = 0; i < kFloats; ++i) best = each[i] > best ? each[i] : best;
  float value;
  memcpy(&value, &best, sizeof(value));
  return value;
}

struct RowScale {
  float scale, inverse;
};

// A row whose largest magnitude is not finite gets the scale NaN.
FASTDIFF_ALWAYS RowScale row_scale(float largest) {
  if (!(largest < __builtin_inff())) return {__builtin_nanf(""), 0.0f};
  return {largest * (1.0f / 127.0f), largest == 0.0f ? 0.0f : 127.0f / largest};
}

// n codes of the elements times `inverse`, plus `offset`, modulo 256
FASTDIFF_ALWAYS void quantize(char* codes, const char* from, int type, int64_t n, float inverse, int offset) {
  for (int64_t i = 0; i < n; i += kFloats) {
    const I8 code = to_codes(load_first(from + i * size_of(type), type, n - i) * inverse) ^ int8_t(offset);
    if (n - i >= kFloats) {
      store(codes + i, code);
    } else {
      memcpy(codes + i, &code, size_t(n - i));
    }
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
