// The precisions of attention. Operands travel as units of 4 bytes: kStep consecutive elements that one instruction
// multiplies and adds. A unit of `lanes` (queries, or their probabilities) meets a unit that is the same for all lanes
// (of a key, or of a channel of kStep values).
//
// Below AVX512 every unit is one float: bfloat16 precision rounds the operands, and codes are integers that float32 holds
// exactly, so that sums of codes are the same at every level.
#pragma once
#include "cpu/functions.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

// Where one is NaN, b.
FASTDIFF_ALWAYS F32 larger(F32 a, F32 b) { return (F32)FASTDIFF_MM(max_ps)((NativeF)a, (NativeF)b); }
FASTDIFF_ALWAYS F32 smaller(F32 a, F32 b) { return (F32)FASTDIFF_MM(min_ps)((NativeF)a, (NativeF)b); }

// To the nearest integer, as a float; |x| < 2^22.
FASTDIFF_ALWAYS F32 rounded(F32 x) { return (x + 12582912.0f) - 12582912.0f; }

// 2^x for x <= 128, 1 at 0, 0 at -infinity. Relative error below 2e-7, or 9e-5 where not kExact.
template <bool kExact>
FASTDIFF_ALWAYS F32 exponential(F32 x) {
#if defined(__AVX512F__)
  if constexpr (!kExact) return short_power_of_two(x);
  const F32 whole = (F32)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F32 r = (F32)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  F32 p = fused(r, splat(1.5353324e-4f), splat(1.3398881e-3f));
  p = fused(p, r, splat(9.618438e-3f));
  p = fused(p, r, splat(5.5503324e-2f));
  p = fused(p, r, splat(0.24022648f));
  p = fused(p, r, splat(0.6931472f));
  return (F32)_mm512_scalef_ps((__m512)fused(p, r, splat(1.0f)), (__m512)whole);
#else
  return power_of_two(x);
#endif
}

constexpr float kLog2Of255 = 7.99435344f;  // codes of probabilities go to 255

struct FloatMode {
  static constexpr int kStep = 1;
  static constexpr bool kExact = true, kCodes = false, kOffset = false;
  using Sum = F32;
  FASTDIFF_ALWAYS Sum add(Sum sum, U32 lanes, U32 unit) { return fused((F32)lanes, (F32)unit, sum); }
  FASTDIFF_ALWAYS Sum start(int32_t) { return F32{}; }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return sum; }
  // kStep vectors of consecutive elements as units, in order
  FASTDIFF_ALWAYS U32 row(const F32 (&parts)[1]) { return (U32)parts[0]; }
  // element i of each of kStep vectors as unit i
  FASTDIFF_ALWAYS U32 join(const F32 (&rows)[1]) { return (U32)rows[0]; }
  // the same for probabilities
  FASTDIFF_ALWAYS U32 weights(const F32 (&rows)[1]) { return (U32)rows[0]; }
  FASTDIFF_ALWAYS Sum count(Sum sum, U32 weights) { return sum + (F32)weights; }
};

#if defined(__AVX512F__)

struct BrainMode {
  static constexpr int kStep = 2;
  static constexpr bool kExact = false, kCodes = false, kOffset = false;
  using Sum = F32;
  FASTDIFF_ALWAYS Sum add(Sum sum, U32 lanes, U32 unit) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)unit);
  }
  FASTDIFF_ALWAYS Sum start(int32_t) { return F32{}; }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return sum; }
  FASTDIFF_ALWAYS U32 row(const F32 (&parts)[2]) {
    return (U32)_mm512_cvtne2ps_pbh((__m512)parts[1], (__m512)parts[0]);
  }
  FASTDIFF_ALWAYS U32 join(const F32 (&rows)[2]) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (U32)_mm512_permutexvar_epi16(order, (__m512i)row(rows));
  }
  FASTDIFF_ALWAYS U32 weights(const F32 (&rows)[2]) { return join(rows); }
  FASTDIFF_ALWAYS Sum count(Sum sum, U32 weights) { return add(sum, weights, U32{} + 0x3f803f80u); }
};

struct CodeMode {
  static constexpr int kStep = 4;
  static constexpr bool kExact = false, kCodes = true, kOffset = true;
  using Sum = I32;
  FASTDIFF_ALWAYS Sum add(Sum sum, U32 lanes, U32 unit) {
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)lanes, (__m512i)unit);
  }
  FASTDIFF_ALWAYS Sum start(int32_t first) { return I32{} + first; }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return __builtin_convertvector(sum, F32); }
  FASTDIFF_ALWAYS U32 row(const F32 (&parts)[4]) {
    __m128i bytes[4];
    FASTDIFF_UNROLL for (int i = 0; i < 4; ++i) bytes[i] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)parts[i]));
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes[0]), bytes[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes[2]), bytes[3], 1);
    return (U32)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  FASTDIFF_ALWAYS U32 join(const F32 (&rows)[4]) {
    __m512i code[4];
    FASTDIFF_UNROLL for (int i = 0; i < 4; ++i) code[i] = _mm512_cvtps_epi32((__m512)rows[i]);
    return transposed(_mm512_packs_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3])));
  }
  FASTDIFF_ALWAYS U32 weights(const F32 (&rows)[4]) {
    __m512i code[4];
    FASTDIFF_UNROLL for (int i = 0; i < 4; ++i) code[i] = _mm512_cvtps_epi32((__m512)rows[i]);
    return transposed(_mm512_packus_epi16(_mm512_packs_epi32(code[0], code[1]), _mm512_packs_epi32(code[2], code[3])));
  }
  FASTDIFF_ALWAYS Sum count(Sum sum, U32) { return sum; }

 private:
  // each 16 bytes are 4 x 4: rows to columns
  FASTDIFF_ALWAYS U32 transposed(__m512i bytes) {
    const __m128i order = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return (U32)_mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(order));
  }
};

#else

struct BrainMode : FloatMode {
  static constexpr bool kExact = false;
  FASTDIFF_ALWAYS U32 row(const F32 (&parts)[1]) { return to_bfloat16(parts[0]) << 16; }
  FASTDIFF_ALWAYS U32 join(const F32 (&rows)[1]) { return row(rows); }
  FASTDIFF_ALWAYS U32 weights(const F32 (&rows)[1]) { return row(rows); }
};

struct CodeMode : FloatMode {
  static constexpr bool kExact = false, kCodes = true;
  FASTDIFF_ALWAYS U32 row(const F32 (&parts)[1]) { return (U32)rounded(parts[0]); }
  FASTDIFF_ALWAYS U32 join(const F32 (&rows)[1]) { return row(rows); }
  FASTDIFF_ALWAYS U32 weights(const F32 (&rows)[1]) { return row(rows); }
};

#endif

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
