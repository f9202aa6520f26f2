// Products with weights of fewer bits than the multiplier takes: a piece of 128 k of two panels at a time is expanded into
// the cache, and all rows of a block pass over it. Every piece is summed on its own and then scaled into float32 sums.
#pragma once
#include "cpu/linear_loop.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kPiece = 128;  // k

// 8-bit codes to int32, 4 k of kFloats columns
FASTDIFF_ALWAYS I32 code_of(U32 row, int k) { return (I32)(row << (24 - 8 * k)) >> 24; }

// 4-bit codes to int32, 8 k of kFloats columns: byte k % 4, low half first
FASTDIFF_ALWAYS I32 nibble_of(U32 row, int k) { return (I32)((row >> (8 * (k % 4) + k / 4 * 4)) & 15u) - 8; }

FASTDIFF_ALWAYS F32 number(I32 code) { return __builtin_convertvector(code, F32); }

// small integers are exact in bfloat16
FASTDIFF_ALWAYS U32 pair(F32 even, F32 odd) { return ((U32)even >> 16) | ((U32)odd & 0xffff0000u); }

// A format: kPerRow k in 64 bytes, and how a vector of them becomes vectors of kind Kind, each 64 bytes from the last.

struct Int8 {
  static constexpr int kPerRow = 4;
  FASTDIFF_ALWAYS void expand(Floats, char* to, const char* from) {
    const U32 row = load<U32>(from);
    FASTDIFF_UNROLL
    for (int k = 0; k < 4; ++k) store(to + k * kStep, number(code_of(row, k)));
  }
  FASTDIFF_ALWAYS void expand(Brains, char* to, const char* from) {
    const U32 row = load<U32>(from);
    FASTDIFF_UNROLL
    for (int k = 0; k < 2; ++k) store(to + k * kStep, pair(number(code_of(row, 2 * k)), number(code_of(row, 2 * k + 1))));
  }
};

struct Int4 {
  static constexpr int kPerRow = 8;
  FASTDIFF_ALWAYS void expand(Floats, char* to, const char* from) {
    const U32 row = load<U32>(from);
    FASTDIFF_UNROLL
    for (int k = 0; k < 8; ++k) store(to + k * kStep, number(nibble_of(row, k)));
  }
  FASTDIFF_ALWAYS void expand(Codes, char* to, const char* from) {
    const U32 row = load<U32>(from);
    store(to, (Bytes)(row & 0x0f0f0f0fu) - 8);
    store(to + kStep, (Bytes)((row >> 4) & 0x0f0f0f0fu) - 8);
  }
#if defined(__AVX512BW__)
  // a table of the 16 bfloat16, twice: bit 4 of an index belongs to another code
  FASTDIFF_ALWAYS void expand(Brains, char* to, const char* from) {
    alignas(64) static const uint16_t table[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i row = _mm512_loadu_si512(from), numbers = _mm512_load_si512(table);
    // bytes 0 and 1, and bytes 2 and 3, of each column to 16 bits each
    const __m512i low = _mm512_shuffle_epi8(row, _mm512_set4_epi32(0x0d0d0c0c, 0x09090808, 0x05050404, 0x01010000));
    const __m512i high = _mm512_shuffle_epi8(row, _mm512_set4_epi32(0x0f0f0e0e, 0x0b0b0a0a, 0x07070606, 0x03030202));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(low, numbers));
    _mm512_storeu_si512(to + kStep, _mm512_permutexvar_epi16(high, numbers));
    _mm512_storeu_si512(to + 2 * kStep, _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4), numbers));
    _mm512_storeu_si512(to + 3 * kStep, _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4), numbers));
  }
#else
  FASTDIFF_ALWAYS void expand(Brains, char* to, const char* from) {
    const U32 row = load<U32>(from);
    FASTDIFF_UNROLL
    for (int k = 0; k < 4; ++k) store(to + k * kStep, pair(number(nibble_of(row, 2 * k)), number(nibble_of(row, 2 * k + 1))));
  }
#endif
};

// k that a step of the kind takes
template <class Kind>
constexpr int kTakes = 1;
template <>
constexpr int kTakes<Brains> = 2;
template <>
constexpr int kTakes<Codes> = 4;

// minus what the offset of the codes adds to the sums over these steps; zero for floats
template <class Kind>
FASTDIFF_ALWAYS void begin_piece(int32_t* first, const char* panel, int64_t steps) {
#if defined(__AVX512VNNI__)
  if constexpr (__is_same(Kind, Codes)) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; ++s)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(kCodeOffset)), _mm512_loadu_si512(panel + s * kStep));
    _mm512_storeu_si512(first, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    return;
  }
#endif
  (void)panel;
  (void)steps;
  memset(first, 0, kPanel * sizeof(*first));
}

// Scales of 32 columns for a group, or ones.
FASTDIFF_ALWAYS void group_scales(float* scale, const Linear& a, int64_t panel, int64_t group) {
  const int64_t groups = a.group ? a.inner / a.group : 0;
  for (int c = 0; c < kUnit * kPanel; ++c) {
    const int64_t column = panel * kPanel + c;
    scale[c] = !a.group ? 1.0f : column < a.sums ? a.group_scale[column * groups + group] : 0.0f;
  }
}

template <class Format, class Kind>
struct Piece {
  static constexpr int kSteps = kPiece / kTakes<Kind>;
  alignas(64) char data[kUnit][kSteps * kStep];
  alignas(64) int32_t first[kUnit * kPanel];
  alignas(64) float scale[kUnit * kPanel];

  // k to k + n of the panels of a block; rows: of 64 bytes in a whole packed panel
  __attribute__((always_inline)) Panels fill(const Linear& a, const Block& b, int64_t k, int64_t n, int64_t rows) {
    const int64_t count = (n + Format::kPerRow - 1) / Format::kPerRow;
    constexpr int kGrows = Format::kPerRow / kTakes<Kind>;
    for (int p = 0; p < b.panels; ++p) {
      const char* from = (const char*)a.weight + ((b.panel + p) * rows + k / Format::kPerRow) * kStep;
      for (int64_t r = 0; r < count; ++r)
        for (int part = 0; part < kStep; part += kBytes)
          Format::expand(Kind{}, data[p] + r * kGrows * kStep + part, from + r * kStep + part);
      begin_piece<Kind>(first + p * kPanel, data[p], count * kGrows);
    }
    group_scales(scale, a, b.panel, a.group ? k / a.group : 0);
    return {data[0], count * kGrows, kSteps * kStep, first, scale};
  }
};

template <class Format, class Kind>
static void multiply_expanded(const Linear& a, const Rows& rows, const Epilogue& e) {
  constexpr int kWidth = kUnit * kPanel;
  const int64_t packed = (a.inner + Format::kPerRow - 1) / Format::kPerRow;
  WriteTile* const write = tile_writer(e);
  for_blocks(a, a.inner * 4 / kTakes<Kind>, [&](const Block& b) {
    Piece<Format, Kind> piece;
    alignas(64) float sums[kBlockRows * kWidth];
    memset(sums, 0, size_t(b.rows) * kWidth * sizeof(float));
    for (int64_t k = 0, n; k < a.inner; k += n) {
      n = least(kPiece, a.inner - k);
      if (a.group) n = least(n, a.group - k % a.group);
      const Panels panels = piece.fill(a, b, k, n, packed);
      for_tiles<Kind::kRows>(b.rows, [&](int64_t row, int count) {
        const Rows tile{rows.base + (b.row + row) * rows.stride + k * 4 / kTakes<Kind>, rows.stride};
        multiply<Kind>(count, b.panels, tile, panels, sums + row * kWidth, kWidth);
      });
    }
    for_tiles<kMaxTileRows>(b.rows, [&](int64_t row, int count) {
      write(e, sums + row * kWidth, kWidth, b.row + row, count, b.panel, b.panels);
    });
  });
}

// Float rows with the kind that their type asks for.
template <class Format>
static void multiply_floats(const Linear& a) {
  if (a.x_type == kFloat32) return multiply_expanded<Format, Floats>(a, float_rows<Floats>(a, Format::kPerRow), a.epilogue);
  multiply_expanded<Format, Brains>(a, float_rows<Brains>(a, Format::kPerRow), a.epilogue);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
