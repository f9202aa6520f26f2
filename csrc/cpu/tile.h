// A register tile of a matrix product, for every kernel that multiplies matrices: R rows times P panels of 16 columns.
//
// The right operand lies in panels (fastdiff/ops/packing.py): a panel is a run of 64-byte steps, a step holds 16 columns
// times 4 bytes of consecutive k. The left operand is rows of bytes with the same 4 bytes per step:
//   Codes     4 int8 codes a step; stored as code + kCodeOffset, which is 128 where the hardware wants them unsigned
//   Brains    2 bfloat16 a step
//   Floats    1 float32 a step
// All accumulate in the order of k, so a number depends on its row, its column and the level only.
//
//   Sums<Codes, R, 2> sum;                                     // in registers while every index is a constant
//   start<Codes, R, 2>(sum, first);                            // first [2 * 16] int32: -kCodeOffset * weight_sum; or zeros
//   accumulate<Codes>(sum, Rows{base, stride}, steps, panel, panel_stride);   // again for every further run of k
//   accumulate<Codes>(sum, RowPointers{pointers, offset}, ...);  // rows anywhere: the taps of a convolution
//   finish<Codes>(sum, out, ld);                               // as float32, to epilogue_tile.h
//
// multiply<Kind>(count, panels, ...) is all four for 1 to kTileRows<Kind> strided rows and 1 or 2 panels.
#pragma once
#include "cpu/tile_kinds.h"
#if defined(__AMX_INT8__) || defined(FASTDIFF_AMX_EMULATED)
#define FASTDIFF_AMX 1
#include "cpu/tile_amx.h"
#endif

namespace fastdiff {
namespace FASTDIFF_ISA {

#define FASTDIFF_UNROLL_ALL _Pragma("GCC unroll 16")

constexpr int kPanel = 16;           // columns of a panel
constexpr int kStep = 64;            // bytes of a panel per step
constexpr int kParts = 64 / kBytes;  // vectors of a panel per step

template <class Kind, int R, int P>
using Sums = typename Kind::Sum[R][P * kParts];

// Row i begins at base + i * stride bytes.
struct Rows {
  const char* base;
  int64_t stride;
};

// Row i begins at row[i] + offset.
struct RowPointers {
  const char* const* row;
  int64_t offset;
};

// Three pointers and a stride reach 14 rows by addressing modes; the compiler left alone keeps 14 pointers and spills.
struct RowsCursor {
  const char *p0, *p5, *p10;
  int64_t stride, stride3;
  FASTDIFF_ALWAYS RowsCursor at(const Rows& rows) {
    return {rows.base, rows.base + 5 * rows.stride, rows.base + 10 * rows.stride, rows.stride, 3 * rows.stride};
  }
  __attribute__((always_inline)) void hide(int rows) {
    asm("" : "+r"(p0));
    if (rows > 5) asm("" : "+r"(p5));
    if (rows > 10) asm("" : "+r"(p10));
  }
  __attribute__((always_inline)) int32_t get(int i) const {
    const char* p = i < 5 ? p0 : i < 10 ? p5 : p10;
    const int k = i % 5;
    int32_t bits;
    memcpy(&bits, k == 0 ? p : k == 1 ? p + stride : k == 2 ? p + 2 * stride : k == 3 ? p + stride3 : p + 4 * stride, 4);
    return bits;
  }
  __attribute__((always_inline)) void advance() {
    p0 += 4;
    p5 += 4;
    p10 += 4;
  }
};

struct PointersCursor {
  const char* const* row;
  int64_t offset;
  FASTDIFF_ALWAYS PointersCursor at(const RowPointers& rows) { return {rows.row, rows.offset}; }
  __attribute__((always_inline)) void hide(int) { asm("" : "+r"(offset)); }
  __attribute__((always_inline)) int32_t get(int i) const {
    int32_t bits;
    memcpy(&bits, row[i] + offset, 4);
    return bits;
  }
  __attribute__((always_inline)) void advance() { offset += 4; }
};

FASTDIFF_ALWAYS RowsCursor cursor(const Rows& rows) { return RowsCursor::at(rows); }
FASTDIFF_ALWAYS PointersCursor cursor(const RowPointers& rows) { return PointersCursor::at(rows); }

// Every row begins with `first`, 16 numbers a panel.
template <class Kind, int R, int P>
FASTDIFF_ALWAYS void start(typename Kind::Sum (&sum)[R][P * kParts], const int32_t* first) {
  FASTDIFF_UNROLL_ALL
  for (int j = 0; j < P * kParts; ++j) {
    const typename Kind::Sum value = load<typename Kind::Sum>(first + j * kFloats);
    FASTDIFF_UNROLL_ALL
    for (int i = 0; i < R; ++i) sum[i][j] = value;
  }
}

// Row i begins with first[i * stride].
template <class Kind, int R, int Vectors>
FASTDIFF_ALWAYS void start_rows(typename Kind::Sum (&sum)[R][Vectors], const int32_t* first, int64_t stride) {
  FASTDIFF_UNROLL_ALL
  for (int i = 0; i < R; ++i) {
    const typename Kind::Sum value = typename Kind::Sum{} + first[i * stride];
    FASTDIFF_UNROLL_ALL
    for (int j = 0; j < Vectors; ++j) sum[i][j] = value;
  }
}

// What runs beside a tile's products: prefetch() with every step, next() after each while there is more(). Here nothing.
struct Nothing {
  FASTDIFF_ALWAYS void prefetch() {}
  FASTDIFF_ALWAYS bool more() { return false; }
  FASTDIFF_ALWAYS void next() {}
};

// Brings in panels that are multiplied later, as far as these are.
struct Later {
  const char* panel;
  int64_t stride;
  int panels;
  __attribute__((always_inline)) void prefetch() {
    for (int j = 0; j < panels; ++j) _mm_prefetch(panel + j * stride, _MM_HINT_T1);
    panel += kStep;
  }
  FASTDIFF_ALWAYS bool more() { return false; }
  FASTDIFF_ALWAYS void next() {}
};

// sum += rows * panels over `steps` steps; panel_stride: bytes from one panel to the next
template <class Kind, class Left, int R, int Vectors, class Beside>
FASTDIFF_ALWAYS void accumulate(typename Kind::Sum (&sum)[R][Vectors], const Left& rows, int64_t steps, const char* panel,
                                int64_t panel_stride, Beside& beside) {
  auto from = cursor(rows);
  const auto step = [&]() __attribute__((always_inline)) {
    from.hide(R);
    typename Kind::Right right[Vectors];
    FASTDIFF_UNROLL_ALL
    for (int j = 0; j < Vectors; ++j) right[j] = Kind::right(load<U32>(panel + j / kParts * panel_stride + j % kParts * kBytes));
    FASTDIFF_UNROLL_ALL
    for (int i = 0; i < R; ++i) {
      const typename Kind::Left left = Kind::left(from.get(i));
      FASTDIFF_UNROLL_ALL
      for (int j = 0; j < Vectors; ++j) sum[i][j] = Kind::add(sum[i][j], left, right[j]);
    }
    from.advance();
    panel += kStep;
    beside.prefetch();
  };
  int64_t s = 0;
  for (; s < steps && beside.more(); ++s) {
    step();
    beside.next();
  }
  for (; s < steps; ++s) step();
}

template <class Kind, class Left, int R, int Vectors>
FASTDIFF_ALWAYS void accumulate(typename Kind::Sum (&sum)[R][Vectors], const Left& rows, int64_t steps, const char* panel,
                                int64_t panel_stride) {
  Nothing nothing;
  accumulate<Kind>(sum, rows, steps, panel, panel_stride, nothing);
}

// out[i][16 * panel + column] = float(sum), ld floats from row to row
template <class Kind, int R, int Vectors>
FASTDIFF_ALWAYS void finish(const typename Kind::Sum (&sum)[R][Vectors], float* out, int64_t ld) {
  FASTDIFF_UNROLL_ALL
  for (int i = 0; i < R; ++i) {
    FASTDIFF_UNROLL_ALL
    for (int j = 0; j < Vectors; ++j) store(out + i * ld + j * kFloats, Kind::to_float(sum[i][j]));
  }
}

// out[i][16 * panel + column] += sum * scale[16 * panel + column]
template <class Kind, int R, int Vectors>
FASTDIFF_ALWAYS void fold(const typename Kind::Sum (&sum)[R][Vectors], const float* scale, float* out, int64_t ld) {
  FASTDIFF_UNROLL_ALL
  for (int j = 0; j < Vectors; ++j) {
    const F32 factor = load<F32>(scale + j * kFloats);
    FASTDIFF_UNROLL_ALL
    for (int i = 0; i < R; ++i) {
      float* const to = out + i * ld + j * kFloats;
      store(to, Kind::fold(load<F32>(to), sum[i][j], factor));
    }
  }
}

// A run of k of panels, and what the sums over it begin with and are multiplied by; without `scale` sums replace `out`.
struct Panels {
  const char* data;
  int64_t steps, stride;
  const int32_t* first;  // a number per column, or per row where first_stride is not 0
  int64_t first_stride;
  const float* scale;
  int64_t later = 0;  // bytes to the panels to prefetch; 0: none
};

FASTDIFF_ALWAYS Panels panel_of(const Panels& p, int k) {
  return {p.data + k * p.stride, p.steps, p.stride, p.first_stride ? p.first : p.first + k * kPanel, p.first_stride,
          p.scale ? p.scale + k * kPanel : p.scale, p.later};
}

template <class Kind, int R, int P>
FASTDIFF_ALWAYS void begin(typename Kind::Sum (&sum)[R][P * kParts], const Panels& p) {
  if constexpr (__is_same(Kind, Nibbles)) {
    start_rows<Kind>(sum, p.first, p.first_stride);
  } else {
    start<Kind, R, P>(sum, p.first);
  }
}

template <class Kind, int R, int P>
static __attribute__((noinline)) void multiply_rows(const Rows& rows, const Panels& p, float* out, int64_t ld) {
  Sums<Kind, R, P> sum;
  begin<Kind, R, P>(sum, p);
  if (p.later) {
    Later later{p.data + p.later, p.stride, P};
    accumulate<Kind>(sum, rows, p.steps, p.data, p.stride, later);
  } else {
    accumulate<Kind>(sum, rows, p.steps, p.data, p.stride);
  }
  p.scale ? fold<Kind>(sum, p.scale, out, ld) : finish<Kind>(sum, out, ld);
}

template <class Kind, int P, int R = Kind::kRows>
FASTDIFF_ALWAYS void multiply_up_to(int count, const Rows& rows, const Panels& p, float* out, int64_t ld) {
  if constexpr (R > 1) {
    if (count < R) return multiply_up_to<Kind, P, R - 1>(count, rows, p, out, ld);
  }
  multiply_rows<Kind, R, P>(rows, p, out, ld);
}

// Whether multiply() runs on AMX.
template <class Kind>
#if defined(FASTDIFF_AMX)
constexpr bool kOnTiles = __is_same(Kind, Codes) || __is_same(Kind, Brains);
#else
constexpr bool kOnTiles = false;
#endif

// The most rows that multiply() takes.
template <class Kind>
constexpr int kTileRows = kOnTiles<Kind> ? 16 : Kind::kRows;

#if defined(FASTDIFF_AMX)
template <class Kind>
static void multiply_on_tiles(int count, int panels, const Rows& rows, const Panels& p, float* out, int64_t ld) {
  using Sum = typename Kind::Sum;
  alignas(64) Sum sums[16][2];
  multiply_tiles<__is_same(Kind, Codes)>(count, panels, rows.base, rows.stride, p.data, p.stride, p.steps, p.first, sums);
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < panels; ++j) {
      float* const to = out + i * ld + j * kPanel;
      store(to, p.scale ? Kind::fold(load<F32>(to), sums[i][j], load<F32>(p.scale + j * kPanel)) : Kind::to_float(sums[i][j]));
    }
}
#endif

// out [count, 16 * panels] = rows * panels, for count in 1..kTileRows and 1 or 2 panels
template <class Kind>
static void multiply(int count, int panels, const Rows& rows, const Panels& p, float* out, int64_t ld) {
#if defined(FASTDIFF_AMX)
  if constexpr (kOnTiles<Kind>) return multiply_on_tiles<Kind>(count, panels, rows, p, out, ld);
#endif
  if constexpr (kTilePanels == 2) {
    if (panels == 2) return multiply_up_to<Kind, 2>(count, rows, p, out, ld);
  }
  for (int k = 0; k < panels; ++k) multiply_up_to<Kind, 1>(count, rows, panel_of(p, k), out + k * kPanel, ld);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
