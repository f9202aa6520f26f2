// What a step of a matrix product is: 4 bytes of a row, 4 bytes of each of 16 columns, and their sum.
//
// left() broadcasts the row's bytes, right() takes the columns', add() multiplies them into a Sum; to_float() and fold() end
// with float32. kRows: as many rows as the registers hold.
#pragma once
#include "cpu/activation.h"  // multiply_add

namespace fastdiff {
namespace FASTDIFF_ISA {

#if defined(__AVX512F__)
constexpr int kCodeOffset = 128, kTilePanels = 2;
#else
constexpr int kCodeOffset = 0, kTilePanels = 1;
#endif

struct Floats {
  using Sum = F32;
  using Left = F32;
  using Right = F32;
  static constexpr int kRows = kBytes == 64 ? 14 : kBytes == 32 ? 6 : 2;
  FASTDIFF_ALWAYS Left left(int32_t bits) { return (F32)(I32{} + bits); }
  FASTDIFF_ALWAYS Right right(U32 bits) { return (F32)bits; }
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) { return multiply_add(a, b, sum); }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return sum; }
  FASTDIFF_ALWAYS F32 fold(F32 total, Sum sum, F32 scale) { return multiply_add(sum, scale, total); }
};

#if defined(__AVX512BF16__)
struct Brains {
  using Sum = F32;
  using Left = I32;
  using Right = I32;
  static constexpr int kRows = 14;
  FASTDIFF_ALWAYS Left left(int32_t bits) { return I32{} + bits; }
  FASTDIFF_ALWAYS Right right(U32 bits) { return (I32)bits; }
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return sum; }
  FASTDIFF_ALWAYS F32 fold(F32 total, Sum sum, F32 scale) { return multiply_add(sum, scale, total); }
};
#else
struct Brains {
  struct Pair {
    F32 even, odd;
  };
  using Sum = F32;
  using Left = Pair;
  using Right = Pair;
  static constexpr int kRows = kBytes == 32 ? 4 : 2;
  FASTDIFF_ALWAYS Pair split(U32 bits) { return {(F32)(bits << 16), (F32)(bits & 0xffff0000u)}; }
  FASTDIFF_ALWAYS Left left(int32_t bits) { return split(U32{} + uint32_t(bits)); }
  FASTDIFF_ALWAYS Right right(U32 bits) { return split(bits); }
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) {
    return multiply_add(a.odd, b.odd, multiply_add(a.even, b.even, sum));
  }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return sum; }
  FASTDIFF_ALWAYS F32 fold(F32 total, Sum sum, F32 scale) { return multiply_add(sum, scale, total); }
};
#endif

#if defined(__AVX512VNNI__)
struct Codes {
  using Sum = I32;
  using Left = I32;
  using Right = I32;
  static constexpr int kRows = 14;
  FASTDIFF_ALWAYS Left left(int32_t bits) { return I32{} + bits; }
  FASTDIFF_ALWAYS Right right(U32 bits) { return (I32)bits; }
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) {
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
  }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return __builtin_convertvector(sum, F32); }
  // two roundings on every level, so that all give the same bits
  FASTDIFF_ALWAYS F32 fold(F32 total, Sum sum, F32 scale) { return total + to_float(sum) * scale; }
};
#elif defined(__AVX2__)
struct Codes {
  struct Signed {
    I32 code, magnitude;
  };
  using Sum = I32;
  using Left = Signed;
  using Right = I32;
  static constexpr int kRows = 5;
  FASTDIFF_ALWAYS Left left(int32_t bits) {
    const I32 code = I32{} + bits;
    return {code, (I32)_mm256_abs_epi8((__m256i)code)};
  }
  FASTDIFF_ALWAYS Right right(U32 bits) { return (I32)bits; }
  // exact: codes lie in [-127, 127], so two products fit in 16 bits
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) {
    const __m256i products = _mm256_maddubs_epi16((__m256i)a.magnitude, _mm256_sign_epi8((__m256i)b, (__m256i)a.code));
    return sum + (I32)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
  }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return __builtin_convertvector(sum, F32); }
  // two roundings on every level, so that all give the same bits
  FASTDIFF_ALWAYS F32 fold(F32 total, Sum sum, F32 scale) { return total + to_float(sum) * scale; }
};
#else
struct Codes {
  struct Halves {
    __m128i even, odd;  // bytes 0 and 2, bytes 1 and 3, as int16
  };
  using Sum = I32;
  using Left = Halves;
  using Right = Halves;
  static constexpr int kRows = 2;
  FASTDIFF_ALWAYS Halves split(I32 bytes) {
    return {_mm_srai_epi16(_mm_slli_epi16((__m128i)bytes, 8), 8), _mm_srai_epi16((__m128i)bytes, 8)};
  }
  FASTDIFF_ALWAYS Left left(int32_t bits) { return split(I32{} + bits); }
  FASTDIFF_ALWAYS Right right(U32 bits) { return split((I32)bits); }
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) {
    return sum + (I32)_mm_madd_epi16(a.even, b.even) + (I32)_mm_madd_epi16(a.odd, b.odd);
  }
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return __builtin_convertvector(sum, F32); }
  // two roundings on every level, so that all give the same bits
  FASTDIFF_ALWAYS F32 fold(F32 total, Sum sum, F32 scale) { return total + to_float(sum) * scale; }
};
#endif

// 4 unsigned 4-bit codes a step, times the signed codes of a row: what begins with -8 times the sum of the row's codes
// needs no offset. Two products of 15 * 127 fit in 16 bits.
struct Nibbles {
  using Sum = I32;
#if defined(__AVX2__)
  using Left = I32;
  using Right = I32;
  static constexpr int kRows = kBytes == 64 ? 14 : 6;
  FASTDIFF_ALWAYS Left left(int32_t bits) { return I32{} + bits; }
  FASTDIFF_ALWAYS Right right(U32 bits) { return (I32)bits; }
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) {
#if defined(__AVX512VNNI__)
    return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
#else
    const __m256i products = _mm256_maddubs_epi16((__m256i)b, (__m256i)a);
    return sum + (I32)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
#endif
  }
#else
  using Left = Codes::Left;
  using Right = Codes::Right;
  static constexpr int kRows = Codes::kRows;
  FASTDIFF_ALWAYS Left left(int32_t bits) { return Codes::left(bits); }
  FASTDIFF_ALWAYS Right right(U32 bits) { return Codes::right(bits); }
  FASTDIFF_ALWAYS Sum add(Sum sum, Left a, Right b) { return Codes::add(sum, a, b); }
#endif
  FASTDIFF_ALWAYS F32 to_float(Sum sum) { return Codes::to_float(sum); }
  FASTDIFF_ALWAYS F32 fold(F32 total, Sum sum, F32 scale) { return Codes::fold(total, sum, scale); }
};

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
