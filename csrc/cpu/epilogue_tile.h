// The epilogue of a tile of sums: what finish() of tile.h has written.
#pragma once
#include "cpu/codes.h"
#include "cpu/epilogue.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kMaxTileRows = 16;

// Addresses of a tile's rows, so that columns need no division.
struct TileRows {
  float scale[kMaxTileRows];
  const float* shift[kMaxTileRows];
  const char *gate[kMaxTileRows], *residual[kMaxTileRows];
  char* out[kMaxTileRows];
};

FASTDIFF_ALWAYS void find_rows(TileRows& t, const Epilogue& e, int64_t first, int rows) {
  for (int i = 0; i < rows; ++i) {
    const int64_t r = first + i;
    t.scale[i] = e.row_scale ? e.row_scale[r * e.row_scale_stride] : 1.0f;
    t.out[i] = (char*)e.out + r * e.out_stride * size_of(e.out_type);
    if (e.shift) t.shift[i] = e.shift + r / e.rows_per_shift * e.shift_stride;
    if (e.gate) t.gate[i] = (const char*)e.gate + r / e.rows_per_gate * e.gate_stride * size_of(e.gate_type);
    if (e.residual) t.residual[i] = (const char*)e.residual + r * e.residual_stride * size_of(e.residual_type);
  }
}

FASTDIFF_ALWAYS F32 load_some(const char* row, int64_t column, int type, int64_t n) {
  return load_first(row + column * size_of(type), type, n);
}

FASTDIFF_ALWAYS F32 load_some(const float* from, int64_t column, int64_t n) {
  return load_some((const char*)from, column, kFloat32, n);
}

FASTDIFF_ALWAYS void store_any(void* to, F32 v, int type, float inverse) {
  if (type == kInt8) return store(to, to_codes(v * inverse));
  store_float(to, v, type);
}

FASTDIFF_ALWAYS void store_some(char* row, int64_t column, F32 v, int type, int64_t n, float inverse) {
  char* to = row + column * size_of(type);
  if (n >= kFloats) return store_any(to, v, type, inverse);
  alignas(64) char staged[kBytes];
  store_any(staged, v, type, inverse);
  memcpy(to, staged, size_t(n * size_of(type)));
}

template <int A>
FASTDIFF_ALWAYS F32 activated(F32 v) {
  if constexpr (A == kGelu || A == kGeglu) return gelu(v);
  if constexpr (A == kGeluTanh || A == kGegluTanh) return gelu_tanh(v);
  if constexpr (A == kSilu || A == kSwiglu) return silu(v);
  return v;
}

// What is the same for all rows of kFloats columns of sums.
struct Column {
  F32 scale, bias;
  FASTDIFF_ALWAYS Column at(const Epilogue& e, int64_t column, int64_t n) {
    return {e.column_scale ? load_some(e.column_scale, column, n) : splat(1.0f),
            e.bias ? load_some(e.bias, column, n) : F32{}};
  }
};

FASTDIFF_ALWAYS F32 scaled(const Epilogue& e, const TileRows& t, int i, const float* sum, const Column& c, int64_t column,
                           int64_t n) {
  F32 y = load<F32>(sum) * t.scale[i] * c.scale;
  if (e.bias) y = y + c.bias;
  if (e.shift) y = y + load_some(t.shift[i], column, n);
  return y;
}

// kFloats columns of the result for all rows: sums of `column`, and for pairs also of column + 16
template <int A>
FASTDIFF_ALWAYS void write_columns(const Epilogue& e, const TileRows& t, const float* sums, int64_t ld, int rows,
                                   int64_t column, int64_t out_column, float inverse) {
  const int64_t n = e.columns - out_column, m = takes_pairs(A) ? kFloats : n;
  const Column value = Column::at(e, column, m), gate = takes_pairs(A) ? Column::at(e, column + 16, m) : value;
  for (int i = 0; i < rows; ++i) {
    F32 y = scaled(e, t, i, sums + i * ld, value, column, m);
    y = takes_pairs(A) ? y * activated<A>(scaled(e, t, i, sums + i * ld + 16, gate, column + 16, m)) : activated<A>(y);
    if (e.gate) y = y * load_some(t.gate[i], out_column, e.gate_type, n);
    if (e.residual) y = y + load_some(t.residual[i], out_column, e.residual_type, n);
    store_some(t.out[i], out_column, y, e.out_type, n, inverse);
  }
}

template <int A>
static __attribute__((noinline)) void write_tile_as(const Epilogue& e, const float* sums, int64_t ld, int64_t row, int rows,
                                                    int64_t panel, int panels) {
  TileRows t;
  find_rows(t, e, row, rows);
  const float inverse = e.out_scale ? 1.0f / *e.out_scale : 1.0f;
  constexpr int kPer = takes_pairs(A) ? 2 : 1;  // panels of sums for a panel of the result
  for (int p = 0; p < panels; p += kPer) {
    for (int j = 0; j < 16; j += kFloats) {
      const int64_t column = (panel + p) * 16 + j, out_column = (panel + p) / kPer * 16 + j;
      if (out_column >= e.columns) return;
      write_columns<A>(e, t, sums + p * 16 + j, ld, rows, column, out_column, inverse);
    }
  }
}

// Stores up to kMaxTileRows rows from `row` on and panels [panel, panel + panels) of the sums; both even for pairs.
static inline void write_tile(const Epilogue& e, const float* sums, int64_t ld, int64_t row, int rows, int64_t panel,
                              int panels) {
  switch (e.activation) {
    case kGelu: return write_tile_as<kGelu>(e, sums, ld, row, rows, panel, panels);
    case kGeluTanh: return write_tile_as<kGeluTanh>(e, sums, ld, row, rows, panel, panels);
    case kSilu: return write_tile_as<kSilu>(e, sums, ld, row, rows, panel, panels);
    case kGeglu: return write_tile_as<kGeglu>(e, sums, ld, row, rows, panel, panels);
    case kGegluTanh: return write_tile_as<kGegluTanh>(e, sums, ld, row, rows, panel, panels);
    case kSwiglu: return write_tile_as<kSwiglu>(e, sums, ld, row, rows, panel, panels);
    default: return write_tile_as<kLinear>(e, sums, ld, row, rows, panel, panels);
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
