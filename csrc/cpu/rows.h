// Runs of contiguous elements: whole vectors and a last part of one, sums in a fixed order.
#pragma once
#include "cpu/simd.h"

#define FASTDIFF_UNROLL16 _Pragma("GCC unroll 16")

namespace fastdiff {
namespace FASTDIFF_ISA {

// How much of a vector exists: all of it, or the first n lanes, past which nothing is read or written.
struct Whole {};
struct Part {
  int64_t n;
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f with the floating-point type as a constant.
template <class F>
FASTDIFF_ALWAYS void with_float(int type, F f) {
  if (type == kFloat32) return f(Constant<kFloat32>());
  if (type == kBFloat16) return f(Constant<kBFloat16>());
  f(Constant<kFloat16>());
}

template <class F>
FASTDIFF_ALWAYS void with_stored(int type, F f) {
  if (type == kInt8) return f(Constant<kInt8>());
  with_float(type, f);
}

// f(i, Whole or Part) for i = 0, kFloats, ... below n
template <class F>
FASTDIFF_ALWAYS void each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) f(i, Whole());
  if (i < n) f(i, Part{n - i});
}

FASTDIFF_ALWAYS const char* element(const void* data, int64_t index, int type) {
  return (const char*)data + index * size_of(type);
}
FASTDIFF_ALWAYS char* element(void* data, int64_t index, int type) { return (char*)data + index * size_of(type); }

FASTDIFF_ALWAYS F32 fetch(const void* from, int type, Whole) { return load_float(from, type); }
FASTDIFF_ALWAYS F32 keep(F32 value, Whole) { return value; }

typedef int8_t I8Quarter __attribute__((vector_size(kBytes / 4)));  // as many lanes as F32

// Codes in [-127, 127] of scaled values: rounded to nearest even, 0 for NaN.
FASTDIFF_ALWAYS I32 to_code(F32 value) {
  value = (F32)FASTDIFF_MM(min_ps)((NativeF)(F32{} + 127.0f), (NativeF)value);
  value = (F32)FASTDIFF_MM(max_ps)((NativeF)(F32{} - 127.0f), (NativeF)value);
  return (I32)FASTDIFF_MM(cvtps_epi32)((NativeF)value);  // NaN gives 2^31, whose low byte is 0
}

FASTDIFF_ALWAYS void put(void* to, F32 value, int type, Whole) {
  if (type != kInt8) return store_float(to, value, type);
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)to_code(value)));
#else
  store(to, __builtin_convertvector(to_code(value), I8Quarter));
#endif
}

#if defined(__AVX512F__)
FASTDIFF_ALWAYS __mmask16 lanes(Part part) { return __mmask16((1u << part.n) - 1); }

FASTDIFF_ALWAYS F32 fetch(const void* from, int type, Part part) {
  if (type == kFloat32) return (F32)_mm512_maskz_loadu_ps(lanes(part), from);
  const __m256i half = _mm256_maskz_loadu_epi16(lanes(part), from);
  if (type == kFloat16) return (F32)_mm512_cvtph_ps(half);
  return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

FASTDIFF_ALWAYS F32 keep(F32 value, Part part) { return (F32)_mm512_maskz_mov_ps(lanes(part), (__m512)value); }

FASTDIFF_ALWAYS void put(void* to, F32 value, int type, Part part) {
  if (type == kFloat32) return _mm512_mask_storeu_ps(to, lanes(part), (__m512)value);
  if (type == kInt8) return _mm_mask_storeu_epi8(to, lanes(part), _mm512_cvtepi32_epi8((__m512i)to_code(value)));
  uint16_t half[kFloats];
  store_float(half, value, type);
  _mm256_mask_storeu_epi16(to, lanes(part), _mm256_loadu_si256((const __m256i*)half));
}
#else
FASTDIFF_ALWAYS F32 fetch(const void* from, int type, Part part) {
  float buffer[kFloats] = {};
  memcpy(buffer, from, size_t(part.n * size_of(type)));
  return load_float(buffer, type);
}

FASTDIFF_ALWAYS F32 keep(F32 value, Part part) {
  float buffer[kFloats] = {}, all[kFloats];
  store(all, value);
  memcpy(buffer, all, size_t(part.n) * sizeof(float));
  return load<F32>(buffer);
}

FASTDIFF_ALWAYS void put(void* to, F32 value, int type, Part part) {
  float buffer[kFloats];
  put(buffer, value, type, Whole());
  memcpy(to, buffer, size_t(part.n * size_of(type)));
}
#endif

#if defined(__AVX512BF16__)
FASTDIFF_ALWAYS __m256i narrow(F32 value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }
#else
// what the instruction does: numbers below 2^-126 become zeros
FASTDIFF_ALWAYS U16Half narrow(F32 value) {
  const U32 bits = (U32)value, zero = bits & 0x80000000u;
  return __builtin_convertvector(to_bfloat16((F32)((bits & 0x7f800000u) == 0u ? zero : bits)), U16Half);
}
#endif

// The same as put, but bfloat16 results have no subnormal numbers: one instruction instead of eight.
FASTDIFF_ALWAYS void put_result(void* to, F32 value, int type, Whole) {
  if (type != kBFloat16) return put(to, value, type, Whole());
  store(to, narrow(value));
}
FASTDIFF_ALWAYS void put_result(void* to, F32 value, int type, Part part) {
  if (type != kBFloat16) return put(to, value, type, part);
  const auto half = narrow(value);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, lanes(part), (__m256i)half);
#else
  memcpy(to, &half, size_t(part.n) * 2);
#endif
}

// put_result past the caches; `to` must be aligned to the bytes written. _mm_sfence() before other threads may read it.
FASTDIFF_ALWAYS void put_past(void* to, F32 value, int type) {
  if (type == kFloat32) return store_past((float*)to, value);
  alignas(kBytes / 2) char half[kBytes / 2];
  put_result(half, value, type, Whole());
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)half));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)to, _mm_load_si128((const __m128i*)half));
#else
  _mm_stream_si64((long long*)to, load<int64_t>(half));
#endif
}

// put_result, or put_past where whole vectors may go past the caches.
FASTDIFF_ALWAYS void put_either(void* to, F32 value, int type, bool past, Whole whole) {
  if (past) return put_past(to, value, type);
  put_result(to, value, type, whole);
}
FASTDIFF_ALWAYS void put_either(void* to, F32 value, int type, bool, Part part) { put_result(to, value, type, part); }

// The sum of a vector's lanes: the upper half is added to the lower until one is left.
FASTDIFF_ALWAYS float join_lanes(F32 value) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)value;
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m256 eight = (__m256)value;
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  __m128 four = (__m128)value;
#endif
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// 64 sums side by side: lane l takes elements l, l + 64, ...; then halves are added until one is left.
struct Lanes64 {
  static constexpr int kVectors = 64 / kFloats;
  F32 v[kVectors] = {};

  FASTDIFF_ALWAYS float join(Lanes64& s) {
    FASTDIFF_UNROLL
    for (int half = kVectors / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) s.v[k] = s.v[k] + s.v[k + half];
    return join_lanes(s.v[0]);
  }
};

// Calls f(lane vector, i, Whole or Part) so that element i goes to lane i % 64.
template <class F>
FASTDIFF_ALWAYS void each_lane(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    FASTDIFF_UNROLL16
    for (int k = 0; k < Lanes64::kVectors; ++k) f(k, i + k * kFloats, Whole());
  }
  FASTDIFF_UNROLL16
  for (int k = 0; k < Lanes64::kVectors; ++k) {
    const int64_t left = n - i - k * kFloats;
    if (left >= kFloats) {
      f(k, i + k * kFloats, Whole());
    } else if (left > 0) {
      f(k, i + k * kFloats, Part{left});
    }
  }
}

constexpr int64_t kSerial = 1 << 16;         // elements below which a call stays on one thread
constexpr int64_t kPastCaches = 16ll << 20;  // bytes of a result from which stores bypass the caches
constexpr int64_t kBlock = 4096;             // elements summed in float32; blocks are added up in float64

// Sum of n <= kBlock elements.
template <int kType>
FASTDIFF_ALWAYS float sum_block(const void* x, int64_t n) {
  Lanes64 s;
  each_lane(n, [&](int k, int64_t i, auto part) { s.v[k] = s.v[k] + fetch(element(x, i, kType), kType, part); });
  return Lanes64::join(s);
}

// Sums of (x - pivot) and its square over n <= kBlock elements.
template <int kType>
FASTDIFF_ALWAYS void sum_about(const void* x, int64_t n, float pivot, float& first, float& second) {
  Lanes64 s, t;
  each_lane(n, [&](int k, int64_t i, auto part) {
    const F32 d = keep(fetch(element(x, i, kType), kType, part) - pivot, part);
    s.v[k] = s.v[k] + d;
    t.v[k] = t.v[k] + d * d;
  });
  first = Lanes64::join(s);
  second = Lanes64::join(t);
}

// The mean in two parts, so that x - mean - rest is right where x is large, and the mean square distance from it.
struct Moments {
  float mean, rest, variance;
};

// Moments of rows, step by step for all of them: one row's last additions wait for each other while the next begins.
template <int kType>
FASTDIFF_ALWAYS void moments(const void* const* x, int rows, int64_t n, Moments* to) {
  const double share = 1.0 / double(n);
  for (int r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < n; i += kBlock)
      sum += double(sum_block<kType>(element(x[r], i, kType), n - i < kBlock ? n - i : kBlock));
    to[r].mean = float(sum * share);
  }
  for (int r = 0; r < rows; ++r) {
    double first = 0, second = 0;
    for (int64_t i = 0; i < n; i += kBlock) {
      float a, b;
      sum_about<kType>(element(x[r], i, kType), n - i < kBlock ? n - i : kBlock, to[r].mean, a, b);
      first += double(a);
      second += double(b);
    }
    const double rest = first * share, variance = second * share - rest * rest;
    to[r].rest = float(rest);
    to[r].variance = variance < 0 ? 0.0f : float(variance);
  }
}

template <int kType>
FASTDIFF_ALWAYS Moments moments(const void* x, int64_t n) {
  Moments m;
  moments<kType>(&x, 1, n, &m);
  return m;
}

// The sum of squares of n <= kBlock elements.
template <int kType>
FASTDIFF_ALWAYS float sum_squares(const void* x, int64_t n) {
  Lanes64 s;
  each_lane(n, [&](int k, int64_t i, auto part) {
    const F32 v = fetch(element(x, i, kType), kType, part);
    s.v[k] = s.v[k] + v * v;
  });
  return Lanes64::join(s);
}

// The mean square of n elements.
template <int kType>
FASTDIFF_ALWAYS float mean_square(const void* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock)
    total += double(sum_squares<kType>(element(x, i, kType), n - i < kBlock ? n - i : kBlock));
  return float(total / double(n));
}

// Starts to bring in the line at an address that may lie past the end of memory; nothing is read.
FASTDIFF_ALWAYS void prefetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T0); }

FASTDIFF_ALWAYS float inverse_root(float value) { return 1.0f / __builtin_sqrtf(value); }

FASTDIFF_ALWAYS I32 magnitude(F32 value) { return (I32)value & 0x7fffffff; }
FASTDIFF_ALWAYS I32 larger(I32 a, I32 b) { return a > b ? a : b; }

FASTDIFF_ALWAYS int32_t largest(I32 value) {
  int32_t each[kFloats], most = 0;
  store(each, value);
  for (int l = 0; l < kFloats; ++l) most = each[l] > most ? each[l] : most;
  return most;
}

// The scale of int8 codes and what values are multiplied by, from the bits of the largest magnitude: as integers they
// are ordered, infinity and NaN last.
struct CodeScale {
  float scale, inverse;
};

FASTDIFF_ALWAYS CodeScale code_scale(int32_t largest_bits) {
  if (largest_bits >= 0x7f800000) return {__builtin_nanf(""), __builtin_nanf("")};
  float most;
  memcpy(&most, &largest_bits, sizeof most);
  return {most * (1.0f / 127.0f), most == 0.0f ? 0.0f : 127.0f / most};
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
