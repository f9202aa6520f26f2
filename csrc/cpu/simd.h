// Vectors of the level this file is compiled for (FASTDIFF_ISA). Arithmetic, comparison and ?: are the compiler's vector
// operators; only what they cannot say is an intrinsic. Every lane computes what the scalar would, bit for bit.
//
// Included by kernel files only. No C++ library header may come in here: an inline function of one, compiled with
// AVX512, could be the copy the linker keeps for everybody.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common/types.h"

#define FASTDIFF_ALWAYS static inline __attribute__((always_inline))
// arrays of vectors stay in registers only while every index is a constant
#define FASTDIFF_UNROLL _Pragma("GCC unroll 8")

namespace fastdiff {
namespace FASTDIFF_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#define FASTDIFF_MM(name) _mm512_##name
using NativeF = __m512;
using NativeD = __m512d;
using NativeI = __m512i;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#define FASTDIFF_MM(name) _mm256_##name
using NativeF = __m256;
using NativeD = __m256d;
using NativeI = __m256i;
#else
constexpr int kBytes = 16;
#define FASTDIFF_MM(name) _mm_##name
using NativeF = __m128;
using NativeD = __m128d;
using NativeI = __m128i;
#endif

constexpr int kFloats = kBytes / 4;
typedef float F32 __attribute__((vector_size(kBytes)));
typedef double F64 __attribute__((vector_size(kBytes)));
typedef int32_t I32 __attribute__((vector_size(kBytes)));
typedef int64_t I64 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef uint64_t U64 __attribute__((vector_size(kBytes)));
typedef uint16_t U16Half __attribute__((vector_size(kBytes / 2)));  // as many lanes as F32

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using V = F32;
  using I = I32;
};
template <>
struct VectorOf<double> {
  using V = F64;
  using I = I64;
};

template <class V>
FASTDIFF_ALWAYS V load(const void* from) {
  V value;
  memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
FASTDIFF_ALWAYS void store(void* to, V value) {
  memcpy(to, &value, sizeof(V));
}

// Past the caches; `to` must be aligned to kBytes. Ordinary stores follow it only after _mm_sfence().
FASTDIFF_ALWAYS void store_past(float* to, F32 value) { FASTDIFF_MM(stream_ps)(to, (NativeF)value); }
FASTDIFF_ALWAYS void store_past(double* to, F64 value) { FASTDIFF_MM(stream_pd)(to, (NativeD)value); }

FASTDIFF_ALWAYS F32 square_root(F32 value) { return (F32)FASTDIFF_MM(sqrt_ps)((NativeF)value); }

// bfloat16 and float16, as the 16 low bits of a lane

FASTDIFF_ALWAYS F32 from_bfloat16(U32 bits) { return (F32)(bits << 16); }

FASTDIFF_ALWAYS U32 to_bfloat16(F32 value) {
  const U32 bits = (U32)value, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? (bits >> 16) | 0x40u : rounded;
}

#if defined(__AVX2__)
FASTDIFF_ALWAYS F32 load_float16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
}
FASTDIFF_ALWAYS void store_float16(uint16_t* to, F32 value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
FASTDIFF_ALWAYS F32 load_float16(const uint16_t* from) {
  const U32 half = __builtin_convertvector(load<U16Half>(from), U32), magnitude = half & 0x7fffu;
  const U32 normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 to 127
  const F32 subnormal = __builtin_convertvector((I32)magnitude, F32) * 0x1p-24f;
  const U32 special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? U32{} + 0x400000u : U32{});
  const U32 finite = magnitude < 0x400u ? (U32)subnormal : normal;
  return (F32)((magnitude >= 0x7c00u ? special : finite) | (half & 0x8000u) << 16);
}
FASTDIFF_ALWAYS void store_float16(uint16_t* to, F32 value) {
  const U32 bits = (U32)value, magnitude = bits & 0x7fffffffu;
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 0.5 leaves the float16 subnormal, rounded to nearest even, in the last bits
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000u;
  const U32 nan = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  U32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? nan : half;
  store(to, __builtin_convertvector(half | (bits >> 16 & 0x8000u), U16Half));
}
#endif

// kFloats elements of any 16- or 32-bit type as float32, and back, rounding to nearest even

FASTDIFF_ALWAYS F32 load_float(const void* from, int type) {
  if (type == kFloat32) return load<F32>(from);
  if (type == kFloat16) return load_float16((const uint16_t*)from);
#if defined(__AVX512BW__)
  // one permutation puts every element in the upper half of its lane, and zeros below it
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i place = _mm512_slli_epi32(lane, 16);
  return (F32)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, _mm512_castsi256_si512(load<__m256i>(from)));
#endif
  return from_bfloat16(__builtin_convertvector(load<U16Half>(from), U32));
}

FASTDIFF_ALWAYS void store_float(void* to, F32 value, int type) {
  if (type == kFloat32) return store(to, value);
  if (type == kFloat16) return store_float16((uint16_t*)to, value);
  store(to, __builtin_convertvector(to_bfloat16(value), U16Half));
}

// The S of common/philox.h: one number per lane.
struct Lanes {
  using F = F32;
  using I = I32;
  using U = U32;
  FASTDIFF_ALWAYS U splat(uint32_t value) { return U{} + value; }
  FASTDIFF_ALWAYS void multiply(U a, uint32_t m, U& low, U& high) {
    const U64 even = (U64)FASTDIFF_MM(mul_epu32)((NativeI)a, (NativeI)splat(m));
    const U64 odd = (U64)FASTDIFF_MM(mul_epu32)((NativeI)((U64)a >> 32), (NativeI)splat(m));
    low = (U)((even & 0xffffffffu) | (odd << 32));
    high = (U)((even >> 32) | (odd & 0xffffffff00000000u));
  }
  FASTDIFF_ALWAYS F to_float(I value) { return __builtin_convertvector(value, F32); }
  // both halves are exact, so only the sum rounds
  FASTDIFF_ALWAYS F to_float(U value) { return to_float((I)(value >> 16)) * 65536.0f + to_float((I)(value & 0xffffu)); }
  FASTDIFF_ALWAYS I bits(F value) { return (I)value; }
  FASTDIFF_ALWAYS F from_bits(I value) { return (F)value; }
  FASTDIFF_ALWAYS F square_root(F value) { return FASTDIFF_ISA::square_root(value); }
};

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
