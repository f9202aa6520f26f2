// Rows of floats as int8 codes. Every kernel that quantizes uses these, so that all compute the same bits.
#pragma once
#include "cpu/activation.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

typedef int8_t I8 __attribute__((vector_size(kFloats)));
typedef uint16_t U16 __attribute__((vector_size(kBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kBytes)));

// to [-127, 127]; NaN becomes -127
FASTDIFF_ALWAYS F32 clamp_codes(F32 v) {
  // the second of max's operands where one is NaN
  return (F32)FASTDIFF_MM(max_ps)((NativeF)at_most(v, 127.0f), (NativeF)splat(-127.0f));
}

FASTDIFF_ALWAYS I8 to_codes(F32 v) { return __builtin_convertvector(nearest(clamp_codes(v)), I8); }

// the first n elements of a row, then zeros
FASTDIFF_ALWAYS F32 load_first(const char* from, int type, int64_t n) {
  if (n >= kFloats) return load_float(from, type);
  alignas(64) char staged[kBytes] = {};
  memcpy(staged, from, size_t(n * size_of(type)));
  return load_float(staged, type);
}

// The largest of a vector's integers: its upper half is compared with the lower until 16 bytes are left.
template <class Int, class V>
FASTDIFF_ALWAYS Int largest_lane(V v) {
  if constexpr (sizeof(V) > 16) {
    typedef Int Half __attribute__((vector_size(sizeof(V) / 2)));
    Half half[2];
    memcpy(half, &v, sizeof(V));
    return largest_lane<Int>(half[0] > half[1] ? half[0] : half[1]);
  } else {
    Int best = v[0];
    FASTDIFF_UNROLL
    for (unsigned l = 1; l < sizeof(V) / sizeof(Int); ++l) best = v[l] > best ? v[l] : best;
    return best;
  }
}

// The largest of n integers without their signs. Magnitudes of floats are ordered like their bits.
template <class Int, class V>
FASTDIFF_ALWAYS Int largest_bits(const char* from, int64_t n) {
  constexpr int kLanes = kBytes / sizeof(Int);
  const V mask = V{} + Int(Int(~Int(0)) >> 1);
  V most[4] = {};
  const auto include = [&](V& best, V bits) __attribute__((always_inline)) {
    bits = bits & mask;
    best = bits > best ? bits : best;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) include(most[k], load<V>(from + (i + k * kLanes) * sizeof(Int)));
  for (; i + kLanes <= n; i += kLanes) include(most[0], load<V>(from + i * sizeof(Int)));
  if (i < n) {
    V bits = {};
    memcpy(&bits, from + i * sizeof(Int), size_t(n - i) * sizeof(Int));
    include(most[1], bits);
  }
  include(most[0], most[1]);
  include(most[2], most[3]);
  include(most[0], most[2]);
  return largest_lane<Int>(most[0]);
}

// The largest magnitude of n elements; the largest of numbers, infinity, NaN is what comes last in this list.
FASTDIFF_ALWAYS float largest(const char* from, int type, int64_t n) {
  if (type == kFloat32) return ((F32)(U32{} + largest_bits<uint32_t, U32>(from, n)))[0];
  const U16Half bits = U16Half{} + largest_bits<uint16_t, U16>(from, n);
  return load_float(&bits, type)[0];
}

struct RowScale {
  float scale, inverse;
};

// A row whose largest magnitude is not finite gets the scale NaN.
FASTDIFF_ALWAYS RowScale row_scale(float largest) {
  if (!(largest < __builtin_inff())) return {__builtin_nanf(""), 0.0f};
  return {largest * (1.0f / 127.0f), largest == 0.0f ? 0.0f : 127.0f / largest};
}

// kBytes codes of four vectors
FASTDIFF_ALWAYS Bytes join_codes(I32 a, I32 b, I32 c, I32 d) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_packs_epi32((__m512i)a, (__m512i)b), high = _mm512_packs_epi32((__m512i)c, (__m512i)d);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (Bytes)_mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
#elif defined(__AVX2__)
  const __m256i low = _mm256_packs_epi32((__m256i)a, (__m256i)b), high = _mm256_packs_epi32((__m256i)c, (__m256i)d);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return (Bytes)_mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
#else
  return (Bytes)_mm_packs_epi16(_mm_packs_epi32((__m128i)a, (__m128i)b), _mm_packs_epi32((__m128i)c, (__m128i)d));
#endif
}

// clamped: whether magnitudes above 127 / inverse may occur
template <int kType>
FASTDIFF_ALWAYS void quantize_as(char* codes, const char* from, int64_t n, float inverse, int offset, bool clamped) {
  int64_t i = 0;
  for (; i + kBytes <= n; i += kBytes) {
    I32 part[4];
    for (int k = 0; k < 4; ++k) {
      const F32 v = load_float(from + (i + k * kFloats) * size_of(kType), kType) * inverse;
      part[k] = nearest(clamped ? clamp_codes(v) : v);
    }
    store(codes + i, join_codes(part[0], part[1], part[2], part[3]) ^ uint8_t(offset));
  }
  for (; i < n; i += kFloats) {
    const I8 code = to_codes(load_first(from + i * size_of(kType), kType, n - i) * inverse) ^ int8_t(offset);
    memcpy(codes + i, &code, size_t(n - i < kFloats ? n - i : kFloats));
  }
}

// n codes of the elements times `inverse`, plus `offset` modulo 256; offset is 0 or 128.
FASTDIFF_ALWAYS void quantize(char* codes, const char* from, int type, int64_t n, float inverse, int offset) {
  if (type == kFloat32) return quantize_as<kFloat32>(codes, from, n, inverse, offset, true);
  if (type == kFloat16) return quantize_as<kFloat16>(codes, from, n, inverse, offset, true);
  quantize_as<kBFloat16>(codes, from, n, inverse, offset, true);
}

// The same with the row's own scale, which it returns.
FASTDIFF_ALWAYS float quantize_row(char* codes, const char* from, int type, int64_t n, int offset) {
  const RowScale s = row_scale(largest(from, type, n));
  if (type == kFloat32) {
    quantize_as<kFloat32>(codes, from, n, s.inverse, offset, false);
  } else if (type == kFloat16) {
    quantize_as<kFloat16>(codes, from, n, s.inverse, offset, false);
  } else {
    quantize_as<kBFloat16>(codes, from, n, s.inverse, offset, false);
  }
  return s.scale;
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
