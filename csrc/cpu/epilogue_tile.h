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
    t.shift[i] = e.shift ? e.shift + r / e.rows_per_shift * e.shift_stride : nullptr;
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

template <int T>
FASTDIFF_ALWAYS void store_as(char* to, F32 v, float inverse) {
  if constexpr (T == kInt8) {
    store(to, to_codes(v * inverse));
#if defined(__AVX512BF16__)
  } else if constexpr (T == kBFloat16) {  // one instruction for seven; rounds what is below 2^-126 to zero
    store(to, _mm512_cvtneps_pbh((__m512)v));
#endif
  } else {
    store_float(to, v, T);
  }
}

template <int T>
FASTDIFF_ALWAYS void store_some(char* to, F32 v, int64_t n, float inverse) {
  if (n >= kFloats) return store_as<T>(to, v, inverse);
  alignas(64) char staged[kBytes];
  store_as<T>(staged, v, inverse);
  memcpy(to, staged, size_t(n * size_of(T)));
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

// kFloats columns of the sums, for pairs with those of their gates 16 columns on
template <int A>
struct Columns {
  static constexpr bool kPairs = takes_pairs(A);
  int64_t at, out_at, n;  // n: how many of the result are there
  Column value, gate;

  __attribute__((always_inline)) Columns(const Epilogue& e, int64_t column, int64_t out_column)
      : at(column), out_at(out_column), n(e.columns - out_column), value(Column::at(e, at, wide())) {
    if constexpr (kPairs) gate = Column::at(e, at + 16, wide());
  }
  __attribute__((always_inline)) int64_t wide() const { return kPairs ? kFloats : n; }

  template <bool kShifted>
  __attribute__((always_inline)) F32 scaled(const TileRows& t, int i, const float* sum, const Column& c, int64_t from) const {
    const F32 y = load<F32>(sum) * t.scale[i] * c.scale + c.bias;
    return kShifted && t.shift[i] ? y + load_some(t.shift[i], from, wide()) : y;
  }

  template <bool kShifted>
  __attribute__((always_inline)) F32 result(const TileRows& t, int i, const float* sum) const {
    const F32 y = scaled<kShifted>(t, i, sum, value, at);
    if constexpr (kPairs) return y * activated<A>(scaled<kShifted>(t, i, sum + 16, gate, at + 16));
    return activated<A>(y);
  }
};

template <int A, int T>
FASTDIFF_ALWAYS void write_columns(const Epilogue& e, const TileRows& t, const float* sums, int64_t ld, int rows,
                                   const Columns<A>& c, float inverse) {
  const int64_t bytes = c.out_at * size_of(T);
  if (c.n >= kFloats && !e.shift && !e.gate && !e.residual) {
    for (int i = 0; i < rows; ++i) store_as<T>(t.out[i] + bytes, c.template result<false>(t, i, sums + i * ld), inverse);
    return;
  }
  for (int i = 0; i < rows; ++i) {
    F32 y = c.template result<true>(t, i, sums + i * ld);
    if (e.gate) y = y * load_some(t.gate[i], c.out_at, e.gate_type, c.n);
    if (e.residual) y = y + load_some(t.residual[i], c.out_at, e.residual_type, c.n);
    store_some<T>(t.out[i] + bytes, y, c.n, inverse);
  }
}

template <int A, int T>
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
      write_columns<A, T>(e, t, sums + p * 16 + j, ld, rows, Columns<A>(e, column, out_column), inverse);
    }
  }
}

using WriteTile = void(const Epilogue& e, const float* sums, int64_t ld, int64_t row, int rows, int64_t panel, int panels);

template <int A>
FASTDIFF_ALWAYS WriteTile* write_tile_to(int type) {
  if (type == kInt8) return write_tile_as<A, kInt8>;
  if (type == kBFloat16) return write_tile_as<A, kBFloat16>;
  return type == kFloat16 ? write_tile_as<A, kFloat16> : write_tile_as<A, kFloat32>;
}

// What stores up to kMaxTileRows rows from `row` on and panels [panel, panel + panels) of the sums; both even for pairs.
static inline WriteTile* tile_writer(const Epilogue& e) {
  switch (e.activation) {
    case kGelu: return write_tile_to<kGelu>(e.out_type);
    case kGeluTanh: return write_tile_to<kGeluTanh>(e.out_type);
    case kSilu: return write_tile_to<kSilu>(e.out_type);
    case kGeglu: return write_tile_to<kGeglu>(e.out_type);
    case kGegluTanh: return write_tile_to<kGegluTanh>(e.out_type);
    case kSwiglu: return write_tile_to<kSwiglu>(e.out_type);
    default: return write_tile_to<kLinear>(e.out_type);
  }
}

static inline void write_tile(const Epilogue& e, const float* sums, int64_t ld, int64_t row, int rows, int64_t panel,
                              int panels) {
  tile_writer(e)(e, sums, ld, row, rows, panel, panels);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
