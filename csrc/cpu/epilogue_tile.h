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

// For results of type T.
template <int A, int T>
FASTDIFF_ALWAYS F32 activated(F32 v) {
#if defined(__AVX512F__)
  if constexpr (T == kInt8 || T == kBFloat16) {
    if constexpr (A == kGelu || A == kGeglu) return quick_gelu(v, &kQuickGelu);
    if constexpr (A == kGeluTanh || A == kGegluTanh) return quick_gelu(v, &kQuickGeluTanh);
  }
#endif
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
template <int A, int T>
struct Columns {
  static constexpr bool kPairs = takes_pairs(A);
  int64_t at, out_at, n;  // n: how many of the result are there
  Column value, gate;

  __attribute__((always_inline)) Columns(const Epilogue& e, int64_t column, int64_t out_column)
      : at(column), out_at(out_column), n(e.columns - out_column), value(Column::at(e, at, wide())) {
    if constexpr (kPairs) gate = Column::at(e, at + 16, wide());
  }
  __attribute__((always_inline)) int64_t wide() const { return kPairs ? kFloats : n; }

  __attribute__((always_inline)) F32 scaled(const TileRows& t, int i, const float* sum, const Column& c, int64_t from) const {
    const F32 y = load<F32>(sum) * t.scale[i] * c.scale + c.bias;
    return t.shift[i] ? y + load_some(t.shift[i], from, wide()) : y;
  }

  __attribute__((always_inline)) F32 result(const TileRows& t, int i, const float* sum) const {
    const F32 y = scaled(t, i, sum, value, at);
    if constexpr (kPairs) return y * activated<A, T>(scaled(t, i, sum + 16, gate, at + 16));
    return activated<A, T>(y);
  }
};

template <int A, int T>
FASTDIFF_ALWAYS void write_columns(const Epilogue& e, const TileRows& t, const float* sums, int64_t ld, int rows,
                                   const Columns<A, T>& c, float inverse) {
  const int64_t bytes = c.out_at * size_of(T);
  for (int i = 0; i < rows; ++i) {
    F32 y = c.result(t, i, sums + i * ld);
    if (e.gate) y = y * load_some(t.gate[i], c.out_at, e.gate_type, c.n);
    if (e.residual) y = y + load_some(t.residual[i], c.out_at, e.residual_type, c.n);
    store_some<T>(t.out[i] + bytes, y, c.n, inverse);
  }
}

constexpr int kUnit = 2, kUnitColumns = 32;  // panels: a value and its gate

alignas(64) static const float kAllOnes[kUnitColumns] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                         1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
alignas(64) static const float kAllZeros[kUnitColumns] = {};

// Whether all columns of a unit of sums exist and have no shift: what a RowWriter takes.
FASTDIFF_ALWAYS bool is_plain(const Epilogue& e, int64_t panel) {
  return !e.shift && (panel + kUnit) * 16 <= e.columns * (takes_pairs(e.activation) ? 2 : 1);
}

// Brings the line at an address here to be written.
FASTDIFF_ALWAYS void own_line(const char* at) { asm volatile("prefetchw %0" : : "m"(*at)); }

// The epilogue of rows of a unit, a vector of the result with every next(): start() says where sums of how many further
// rows lie. All that it needs lies in memory, so that it can run beside the products of the next tile.
template <int A, int T>
struct RowWriter {
  const float *sums, *row_scale, *column_scale, *bias;
  const char *gate = nullptr, *residual = nullptr;
  char* out;
  int64_t ahead = 0;                                                       // rows that prefetches are ahead of writing
  int64_t ld, row_scale_stride, gate_stride, residual_stride, out_stride;  // all but the first two in bytes
  int64_t rows_per_gate, gate_left;                                       // rows until the next gate
  int64_t column = 0, left = 0;                                           // rows
  int gate_type, residual_type;
  float inverse;

  __attribute__((always_inline)) RowWriter(const Epilogue& e, int64_t row, int64_t panel, int64_t ld) : ld(ld) {
    const int64_t first = panel * 16, result = takes_pairs(A) ? first / 2 : first;
    row_scale = e.row_scale ? e.row_scale + row * e.row_scale_stride : kAllOnes;
    row_scale_stride = e.row_scale ? e.row_scale_stride : 0;
    column_scale = e.column_scale ? e.column_scale + first : kAllOnes;
    bias = e.bias ? e.bias + first : kAllZeros;
    if (e.gate) {
      gate_type = e.gate_type;
      gate_stride = e.gate_stride * size_of(gate_type);
      rows_per_gate = e.rows_per_gate;
      gate = (const char*)e.gate + row / rows_per_gate * gate_stride + result * size_of(gate_type);
      gate_left = rows_per_gate - row % rows_per_gate;
    }
    if (e.residual) {
      residual_type = e.residual_type;
      residual_stride = e.residual_stride * size_of(residual_type);
      residual = (const char*)e.residual + row * residual_stride + result * size_of(residual_type);
    }
    out_stride = e.out_stride * size_of(T);
    out = (char*)e.out + row * out_stride + result * size_of(T);
    inverse = e.out_scale ? 1.0f / *e.out_scale : 1.0f;
  }

  __attribute__((always_inline)) void start(const float* from, int64_t rows) {
    sums = from;
    left = rows;
  }

  __attribute__((always_inline)) bool more() const { return left > 0; }

  // Of the row that is `rows` further on: what is added to it, and its place, which other threads may hold.
  __attribute__((always_inline)) void prefetch(int64_t rows) const {
    constexpr int kWidth = (takes_pairs(A) ? 16 : 32) * size_of(T);
    const char* const to = out + rows * out_stride;
    own_line(to);
    if constexpr (kWidth > 64) own_line(to + 64);
    if (!residual) return;
    const char* const from = residual + rows * residual_stride;
    _mm_prefetch(from, _MM_HINT_T0);
    _mm_prefetch(from + 64, _MM_HINT_T0);
  }

  __attribute__((always_inline)) F32 scaled(int64_t at) const {
    return load<F32>(sums + at) * *row_scale * load<F32>(column_scale + at) + load<F32>(bias + at);
  }

  __attribute__((always_inline)) F32 result() const {
    F32 y = scaled(column);
    if constexpr (takes_pairs(A)) {
      y = y * activated<A, T>(scaled(column + 16));
    } else {
      y = activated<A, T>(y);
    }
    if (gate) y = y * load_float(gate + column * size_of(gate_type), gate_type);
    if (residual) y = y + load_float(residual + column * size_of(residual_type), residual_type);
    return y;
  }

  __attribute__((always_inline)) void next() {
    store_as<T>(out + column * size_of(T), result(), inverse);
    column += kFloats;
    if (column == (takes_pairs(A) ? 16 : 32)) end_row();
  }

  __attribute__((always_inline)) void end_row() {
    column = 0;
    sums += ld;
    row_scale += row_scale_stride;
    out += out_stride;
    if (gate && --gate_left == 0) {
      gate += gate_stride;
      gate_left = rows_per_gate;
    }
    if (residual) residual += residual_stride;
    prefetch(ahead);
    --left;
  }
};

template <int A, int T>
static __attribute__((noinline)) void write_tile_as(const Epilogue& e, const float* sums, int64_t ld, int64_t row, int rows,
                                                    int64_t panel, int panels) {
  int p = 0;
  for (; p + kUnit <= panels && is_plain(e, panel + p); p += kUnit) {
    RowWriter<A, T> writer(e, row, panel + p, ld);
    writer.start(sums + p * 16, rows);
    writer.ahead = rows - 1;
    while (writer.more()) writer.next();
  }
  if (p == panels) return;
  TileRows t;
  find_rows(t, e, row, rows);
  const float inverse = e.out_scale ? 1.0f / *e.out_scale : 1.0f;
  constexpr int kPer = takes_pairs(A) ? 2 : 1;  // panels of sums for a panel of the result
  for (; p < panels; p += kPer) {
    for (int j = 0; j < 16; j += kFloats) {
      const int64_t column = (panel + p) * 16 + j, out_column = (panel + p) / kPer * 16 + j;
      if (out_column >= e.columns) return;
      write_columns<A, T>(e, t, sums + p * 16 + j, ld, rows, Columns<A, T>(e, column, out_column), inverse);
    }
  }
}

using WriteTile = void(const Epilogue& e, const float* sums, int64_t ld, int64_t row, int rows, int64_t panel, int panels);

struct TileWriter {
  using Function = WriteTile;
  template <int A, int T>
  FASTDIFF_ALWAYS Function* get() {
    return write_tile_as<A, T>;
  }
};

template <class Family, int A>
FASTDIFF_ALWAYS typename Family::Function* choose_type(int type) {
  if (type == kInt8) return Family::template get<A, kInt8>();
  if (type == kBFloat16) return Family::template get<A, kBFloat16>();
  return type == kFloat16 ? Family::template get<A, kFloat16>() : Family::template get<A, kFloat32>();
}

template <int A>
FASTDIFF_ALWAYS WriteTile* write_tile_to(int type) {
  return choose_type<TileWriter, A>(type);
}

// The function of a family, one per activation and type of the result.
template <class Family>
FASTDIFF_ALWAYS typename Family::Function* choose(const Epilogue& e) {
  switch (e.activation) {
    case kGelu: return choose_type<Family, kGelu>(e.out_type);
    case kGeluTanh: return choose_type<Family, kGeluTanh>(e.out_type);
    case kSilu: return choose_type<Family, kSilu>(e.out_type);
    case kGeglu: return choose_type<Family, kGeglu>(e.out_type);
    case kGegluTanh: return choose_type<Family, kGegluTanh>(e.out_type);
    case kSwiglu: return choose_type<Family, kSwiglu>(e.out_type);
    default: return choose_type<Family, kLinear>(e.out_type);
  }
}

// What stores up to kMaxTileRows rows from `row` on and panels [panel, panel + panels) of the sums; both even for pairs.
static inline WriteTile* tile_writer(const Epilogue& e) { return choose<TileWriter>(e); }

static inline void write_tile(const Epilogue& e, const float* sums, int64_t ld, int64_t row, int rows, int64_t panel,
                              int panels) {
  tile_writer(e)(e, sums, ld, row, rows, panel, panels);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
