#include "cpu/copy.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kRun = 1 << 14;                    // elements of a row that are one task
constexpr int64_t kAcross = 64, kAlong = 1024;       // extents of a task that transposes

// 16-bit elements whose type does not change are moved as they are
template <int kIn, int kOut>
constexpr bool kMoves = kIn == kOut && kIn != kFloat32;

template <int kIn, int kOut, class P>
FASTDIFF_ALWAYS F32 lift(const void* from, P part) {
  return fetch(from, kMoves<kIn, kOut> ? int(kBFloat16) : kIn, part);
}

FASTDIFF_ALWAYS U16Half upper(F32 value) { return __builtin_convertvector((U32)value >> 16, U16Half); }

template <int kIn, int kOut>
FASTDIFF_ALWAYS void lower(void* to, F32 value, Whole) {
  if (kMoves<kIn, kOut>) return store(to, upper(value));
  put(to, value, kOut, Whole());
}

template <int kIn, int kOut>
FASTDIFF_ALWAYS void lower(void* to, F32 value, Part part) {
  if (!kMoves<kIn, kOut>) return put(to, value, kOut, part);
  uint16_t bits[kFloats];
  store(bits, upper(value));
  memcpy(to, bits, size_t(part.n) * 2);
}

// Offsets into `in` and `out` of the index-th element of the dimensions that are not `skip` bits.
struct Place {
  int64_t in, out;
};

FASTDIFF_ALWAYS Place place(const Copy& c, const int64_t* out_stride, unsigned skip, int64_t index) {
  Place p{0, 0};
  for (int d = c.dims - 1; d >= 0; --d) {
    if (skip >> d & 1) continue;
    const int64_t k = index % c.size[d];
    index /= c.size[d];
    p.in += k * c.stride[d];
    p.out += k * out_stride[d];
  }
  return p;
}

template <int kIn, int kOut>
FASTDIFF_ALWAYS void copy_run(const char* in, int64_t stride, char* out, int64_t n, bool past) {
  constexpr int64_t from = size_of(kIn), to = size_of(kOut);
  if (stride != 1) {
    char some[kFloats * 4] = {};
    for (int64_t i = 0; i < n; i += kFloats) {
      const int64_t count = n - i < kFloats ? n - i : kFloats;
      for (int64_t k = 0; k < count; ++k) memcpy(some + k * from, in + (i + k) * stride * from, from);
      lower<kIn, kOut>(out + i * to, lift<kIn, kOut>(some, Whole()), Part{count});
    }
  } else if (past) {
    for (int64_t i = 0; i < n; i += kFloats) {
      const F32 value = lift<kIn, kOut>(in + i * from, Whole());
      put_past(out + i * to, value, kOut);
    }
  } else {
    each_vector(n, [&](int64_t i, auto part) { lower<kIn, kOut>(out + i * to, lift<kIn, kOut>(in + i * from, part), part); });
  }
}

// Where rows begin in `in`, one after another: divisions take longer than a row of two elements (patches).
struct RowCursor {
  const Copy& c;
  int64_t at[kCopyDims], offset = 0;

  RowCursor(const Copy& c, int64_t row) : c(c) {
    for (int d = c.dims - 2; d >= 0; row /= c.size[d--]) {
      at[d] = row % c.size[d];
      offset += at[d] * c.stride[d];
    }
  }

  void next() {
    for (int d = c.dims - 2; d >= 0; --d) {
      offset += c.stride[d];
      if (++at[d] < c.size[d]) return;
      offset -= c.size[d] * c.stride[d];
      at[d] = 0;
    }
  }
};

template <int kIn, int kOut>
static void copy_rows(const Copy& c, int64_t total, bool past) {
  const int last = c.dims - 1;
  const int64_t n = c.size[last], stride = c.stride[last], chunks = (n + kRun - 1) / kRun, rows = total / n;
  past = past && kOut == kFloat32 && stride == 1 && n % kFloats == 0;
  auto body = [&](int64_t begin, int64_t end) {
    RowCursor row(c, begin / chunks);
    int64_t chunk = begin % chunks;
    char* out = (char*)c.out + begin / chunks * n * size_of(kOut);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = chunk * kRun, count = n - first < kRun ? n - first : kRun;
      copy_run<kIn, kOut>((const char*)c.in + (row.offset + first * stride) * size_of(kIn), stride, out + first * size_of(kOut),
                          count, past);
      if (++chunk < chunks) continue;
      chunk = 0;
      row.next();
      out += n * size_of(kOut);
    }
    _mm_sfence();
  };
  parallel_for(rows * chunks, total < kSerial, body);
}

// Swaps lanes l + kStep of the lower and l of the upper vector of each pair, l without the bit kStep.
template <int kStep>
FASTDIFF_ALWAYS void swap_lanes(F32 (&v)[kFloats]) {
  I32 low, high;
  FASTDIFF_UNROLL16
  for (int l = 0; l < kFloats; ++l) {
    low[l] = l & kStep ? l - kStep + kFloats : l;
    high[l] = l & kStep ? l + kFloats : l + kStep;
  }
  FASTDIFF_UNROLL16
  for (int k = 0; k < kFloats; ++k) {
    if (k & kStep) continue;
    const F32 a = v[k], b = v[k + kStep];
    v[k] = __builtin_shuffle(a, b, low);
    v[k + kStep] = __builtin_shuffle(a, b, high);
  }
}

FASTDIFF_ALWAYS void transpose(F32 (&v)[kFloats]) {
  swap_lanes<1>(v);
  swap_lanes<2>(v);
  if constexpr (kFloats > 4) swap_lanes<4>(v);
  if constexpr (kFloats > 8) swap_lanes<8>(v);
}

// `rows` runs of `columns` elements, `stride` bytes apart, become `columns` runs of `rows`.
template <int kIn, int kOut>
FASTDIFF_ALWAYS void transpose_tile(const char* in, int64_t stride, char* out, int64_t out_stride, int64_t rows,
                                    int64_t columns, bool past) {
  F32 v[kFloats];
  if (rows >= kFloats && columns >= kFloats) {
    FASTDIFF_UNROLL16
    for (int k = 0; k < kFloats; ++k) v[k] = lift<kIn, kOut>(in + k * stride, Whole());
    transpose(v);
    FASTDIFF_UNROLL16
    for (int k = 0; k < kFloats; ++k) {
      if (past) {
        put_past(out + k * out_stride, v[k], kOut);
      } else {
        lower<kIn, kOut>(out + k * out_stride, v[k], Whole());
      }
    }
    return;
  }
  rows = rows < kFloats ? rows : kFloats;
  columns = columns < kFloats ? columns : kFloats;
  FASTDIFF_UNROLL16
  for (int k = 0; k < kFloats; ++k) v[k] = k < rows ? lift<kIn, kOut>(in + k * stride, Part{columns}) : F32{};
  transpose(v);
  FASTDIFF_UNROLL16
  for (int k = 0; k < kFloats; ++k)
    if (k < columns) lower<kIn, kOut>(out + k * out_stride, v[k], Part{rows});
}

// Where the last dimension is not contiguous in `in` but dimension j is.
template <int kIn, int kOut>
static void copy_transposed(const Copy& c, const int64_t* out_stride, int64_t total, int j, bool past) {
  const int last = c.dims - 1;
  const int64_t J = c.size[j], M = c.size[last], across = (J + kAcross - 1) / kAcross, along = (M + kAlong - 1) / kAlong;
  const int64_t step = c.stride[last] * size_of(kIn), out_step = out_stride[j] * size_of(kOut);
  past = past && kOut == kFloat32 && M % kFloats == 0;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Place p = place(c, out_stride, 1u << last | 1u << j, task / (across * along));
      const int64_t j0 = task / along % across * kAcross, m0 = task % along * kAlong;
      const int64_t j1 = j0 + kAcross < J ? j0 + kAcross : J, m1 = m0 + kAlong < M ? m0 + kAlong : M;
      const char* in = (const char*)c.in + p.in * size_of(kIn);
      char* out = (char*)c.out + p.out * size_of(kOut);
      for (int64_t m = m0; m < m1; m += kFloats)
        for (int64_t i = j0; i < j1; i += kFloats)
          transpose_tile<kIn, kOut>(in + m * step + i * size_of(kIn), step, out + i * out_step + m * size_of(kOut),
                                    out_step, m1 - m, j1 - i, past);
    }
    _mm_sfence();
  };
  parallel_for(total / (J * M) * across * along, total < kSerial, body);
}

template <int kIn, int kOut>
static void copy_as(const Copy& c) {
  int64_t out_stride[kCopyDims], total = 1;
  int contiguous = -1;
  for (int d = c.dims - 1; d >= 0; --d) {
    out_stride[d] = total;
    total *= c.size[d];
    if (c.stride[d] == 1) contiguous = d;
  }
  const bool past = total * size_of(kOut) >= kPastCaches && (uintptr_t)c.out % kBytes == 0;
  if (contiguous < 0 || contiguous == c.dims - 1) return copy_rows<kIn, kOut>(c, total, past);
  copy_transposed<kIn, kOut>(c, out_stride, total, contiguous, past);
}

void copy(const Copy& c) {
  with_float(c.in_type, [&](auto in) {
    with_float(c.out_type, [&](auto out) { copy_as<decltype(in)::value, decltype(out)::value>(c); });
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
