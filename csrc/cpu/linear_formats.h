// Weights of fewer bits than the multiplier takes, and how 64 bytes of a panel become several steps of it.
#pragma once
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

// k that a step of the kind takes
template <class Kind>
constexpr int kTakes = 4;
template <>
constexpr int kTakes<Brains> = 2;
template <>
constexpr int kTakes<Floats> = 1;

FASTDIFF_ALWAYS U32 number(I32 code) { return (U32) __builtin_convertvector(code, F32); }

// two bfloat16; small integers are exact
FASTDIFF_ALWAYS U32 pair(I32 even, I32 odd) { return (number(even) >> 16) | (number(odd) & 0xffff0000u); }

// A format: kPerRow k in 64 bytes; expand() takes a vector of them to `to`, one vector per step.

struct Int8 {
  static constexpr int kPerRow = 4;
  FASTDIFF_ALWAYS I32 code(U32 row, int k) { return (I32)(row << (24 - 8 * k)) >> 24; }
  FASTDIFF_ALWAYS void expand(Floats, U32 (&to)[4], U32 row) {
    FASTDIFF_UNROLL
    for (int k = 0; k < 4; ++k) to[k] = number(code(row, k));
  }
  FASTDIFF_ALWAYS void expand(Brains, U32 (&to)[2], U32 row) {
    FASTDIFF_UNROLL
    for (int k = 0; k < 2; ++k) to[k] = pair(code(row, 2 * k), code(row, 2 * k + 1));
  }
};

// Byte j of a column: k = j in the low half, k = 4 + j in the high half, both plus 8.
struct Int4 {
  static constexpr int kPerRow = 8;
  FASTDIFF_ALWAYS U32 shifted(U32 row, int k) { return row >> (8 * (k % 4) + k / 4 * 4); }
  FASTDIFF_ALWAYS I32 code(U32 row, int k) { return (I32)(shifted(row, k) & 15u) - 8; }
  FASTDIFF_ALWAYS void expand(Nibbles, U32 (&to)[2], U32 row) {
    to[0] = row & 0x0f0f0f0fu;
    to[1] = (row >> 4) & 0x0f0f0f0fu;
  }
#if defined(__AVX512BW__)
  // permutations look at 4 or 5 bits of an index: tables of 16 float32, and of 16 bfloat16 twice
  FASTDIFF_ALWAYS void expand(Floats, U32 (&to)[8], U32 row) {
    const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    FASTDIFF_UNROLL
    for (int k = 0; k < 8; ++k) to[k] = (U32)_mm512_permutexvar_ps((__m512i)shifted(row, k), numbers);
  }
  FASTDIFF_ALWAYS void expand(Brains, U32 (&to)[4], U32 row) {
    alignas(64) static const uint16_t table[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i numbers = _mm512_load_si512(table);
    // bytes 0 and 1, and bytes 2 and 3, of each column to 16 bits each
    const __m512i low = _mm512_shuffle_epi8((__m512i)row, _mm512_set4_epi32(0x0d0d0c0c, 0x09090808, 0x05050404, 0x01010000));
    const __m512i high = _mm512_shuffle_epi8((__m512i)row, _mm512_set4_epi32(0x0f0f0e0e, 0x0b0b0a0a, 0x07070606, 0x03030202));
    to[0] = (U32)_mm512_permutexvar_epi16(low, numbers);
    to[1] = (U32)_mm512_permutexvar_epi16(high, numbers);
    to[2] = (U32)_mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4), numbers);
    to[3] = (U32)_mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4), numbers);
  }
#else
  FASTDIFF_ALWAYS void expand(Floats, U32 (&to)[8], U32 row) {
    FASTDIFF_UNROLL
    for (int k = 0; k < 8; ++k) to[k] = number(code(row, k));
  }
  FASTDIFF_ALWAYS void expand(Brains, U32 (&to)[4], U32 row) {
    FASTDIFF_UNROLL
    for (int k = 0; k < 4; ++k) to[k] = pair(code(row, 2 * k), code(row, 2 * k + 1));
  }
#endif
};

template <class Format, class Kind>
constexpr int kGrows = Format::kPerRow / kTakes<Kind>;

// `count` 64-byte rows of a panel, to memory
template <class Format, class Kind>
static void expand_panel(char* to, const char* from, int64_t count) {
  constexpr int kSteps = kGrows<Format, Kind>;
  for (int64_t r = 0; r < count; ++r, from += kStep, to += kSteps * kStep)
    for (int part = 0; part < kStep; part += kBytes) {
      U32 step[kSteps];
      Format::expand(Kind{}, step, load<U32>(from + part));
      FASTDIFF_UNROLL
      for (int s = 0; s < kSteps; ++s) store(to + s * kStep + part, step[s]);
    }
}

// The same multiplications as multiply_rows makes with expanded panels, in the same order; p.steps counts 64-byte rows.
template <class Format, class Kind, int R, int P>
static __attribute__((noinline)) void multiply_narrow(const Rows& rows, const Panels& p, float* out, int64_t ld) {
  constexpr int kSteps = kGrows<Format, Kind>;
  Sums<Kind, R, P> sum;
  begin<Kind, R, P>(sum, p);
  auto from = cursor(rows);
  const char* panel = p.data;
  Later later{panel + p.later, p.stride, P};
  for (int64_t r = 0; r < p.steps; ++r, panel += kStep) {
    later.prefetch();
    U32 step[P * kParts][kSteps];
    FASTDIFF_UNROLL
    for (int j = 0; j < P * kParts; ++j)
      Format::expand(Kind{}, step[j], load<U32>(panel + j / kParts * p.stride + j % kParts * kBytes));
    FASTDIFF_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      FASTDIFF_UNROLL
      for (int i = 0; i < R; ++i) {
        const typename Kind::Left left = Kind::left(from.get(i));
        FASTDIFF_UNROLL
        for (int j = 0; j < P * kParts; ++j) sum[i][j] = Kind::add(sum[i][j], left, Kind::right(step[j][s]));
      }
      from.advance();
    }
  }
  fold<Kind>(sum, p.scale, out, ld);
}

// Up to this many rows, in tiles of so many, expanding in registers beats expanding into the cache. AMX adds in another order
// than AVX512, and a row's bits must not depend on how many there are.
template <class Kind>
constexpr bool kWideTile = kBytes == 64 && !__is_same(Kind, Floats);
template <class Kind>
constexpr int kNarrowRows = kOnTiles<Kind> ? 0 : kWideTile<Kind> ? 16 : 4;
template <class Kind>
constexpr int kNarrowTile = kWideTile<Kind> ? 8 : 4;

template <class Format, class Kind, int P, int R = kNarrowTile<Kind>>
FASTDIFF_ALWAYS void narrow_up_to(int count, const Rows& rows, const Panels& p, float* out, int64_t ld) {
  if constexpr (R > 1) {
    if (count < R) return narrow_up_to<Format, Kind, P, R - 1>(count, rows, p, out, ld);
  }
  multiply_narrow<Format, Kind, R, P>(rows, p, out, ld);
}

// multiply() for 1 to kNarrowTile rows and panels that are not expanded
template <class Format, class Kind>
static void multiply_narrow(int count, int panels, const Rows& rows, const Panels& p, float* out, int64_t ld) {
  if constexpr (kTilePanels == 2) {
    if (panels == 2) return narrow_up_to<Format, Kind, 2>(count, rows, p, out, ld);
  }
  for (int k = 0; k < panels; ++k) narrow_up_to<Format, Kind, 1>(count, rows, panel_of(p, k), out + k * kPanel, ld);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
