#include "cpu/norm_modulate.h"

#include "cpu/codes.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kWorkspace = 6;

// What a row is multiplied by, plus what is added, plus the gate of y: one of each for a sample, or for all.
struct Affine {
  const float *multiply, *add, *gate;
};

struct Affines {
  float* data;  // null: nothing but the norm
  int64_t channels, stride;

  Affine of(int64_t b) const {
    const float* row = data + b * stride;
    return {row, row + channels, row + 2 * channels};
  }
};

template <class P>
FASTDIFF_ALWAYS F32 value_or(const NormModulate::Vector& v, int64_t b, int64_t c, float otherwise, P part) {
  return v.data ? fetch(element(v.data, b * v.stride + c, v.type), v.type, part) : F32{} + otherwise;
}

static void fill_affine(const NormModulate& t, int64_t b, float* row) {
  const int64_t C = t.channels;
  each_vector(C, [&](int64_t c, auto part) {
    const F32 one_more = 1.0f + value_or(t.scale, b, c, 0.0f, part);
    put(row + c, value_or(t.weight, 0, c, 1.0f, part) * one_more, kFloat32, part);
    put(row + C + c, value_or(t.bias, 0, c, 0.0f, part) * one_more + value_or(t.shift, b, c, 0.0f, part), kFloat32, part);
    put(row + 2 * C + c, value_or(t.gate, b, c, 1.0f, part), kFloat32, part);
  });
}

static Affines prepare(const NormModulate& t) {
  const bool per_sample = t.scale.data || t.shift.data || t.gate.data;
  const bool shared = t.weight.data || t.bias.data;
  if (!per_sample && !shared) return {nullptr, t.channels, 0};
  const int64_t rows = per_sample ? t.batch : 1, stride = 3 * t.channels;
  Affines all{(float*)workspace(kWorkspace, size_t(rows * stride) * sizeof(float)), t.channels, per_sample ? stride : 0};
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) fill_affine(t, b, all.data + b * stride);
  };
  parallel_for(rows, rows * stride < kSerial, body);
  return all;
}

template <int kType>
static void add_gated(const NormModulate& t, const void* x, const void* y, const float* gate, void* sum) {
  with_float(t.y.type, [&](auto type) {
    constexpr int y_type = decltype(type)::value;
    each_vector(t.channels, [&](int64_t c, auto part) {
      F32 more = fetch(element(y, c, y_type), y_type, part);
      if (gate) more = fetch(gate + c, kFloat32, part) * more;
      put_result(element(sum, c, kType), fetch(element(x, c, kType), kType, part) + more, kType, part);
    });
  });
}

// One normalized row: `affine` is null where nothing follows the norm.
template <int kType, bool kAffine>
struct Normed {
  const void* x;
  float mean, rest, factor;
  Affine affine;

  template <class P>
  FASTDIFF_ALWAYS F32 at(const Normed& r, int64_t c, P part) {
    const F32 y = (fetch(element(r.x, c, kType), kType, part) - r.mean - r.rest) * r.factor;
    if (!kAffine) return y;
    return y * fetch(r.affine.multiply + c, kFloat32, part) + fetch(r.affine.add + c, kFloat32, part);
  }
};

// `next` is the row after this one. Fetched while this one is written, it costs no waiting: the sums in front of the
// writing leave memory idle otherwise.
template <int kType, int kOut, class Row>
FASTDIFF_ALWAYS void write_row(const Row& row, int64_t n, void* out, bool past, const void* next) {
  if (past) {
    for (int64_t c = 0; c < n; c += kFloats) {
      prefetch(element(next, c, kType));
      put_past(element(out, c, kOut), Row::at(row, c, Whole()), kOut);
    }
  } else {
    each_vector(n, [&](int64_t c, auto part) { put_result(element(out, c, kOut), Row::at(row, c, part), kOut, part); });
  }
}

constexpr int64_t kKept = 4096;  // channels of normalized rows that fit in the first cache
constexpr int kTogether = 4;     // short rows that go through the norm step by step; long ones wait for memory instead
constexpr int64_t kShort = 512;

// The bits of the largest magnitude of a normalized row, which `kept` takes unless it is null.
template <class Row>
FASTDIFF_ALWAYS int32_t normalize(const Row& row, int64_t n, float* kept) {
  I32 most{};
  each_vector(n, [&](int64_t c, auto part) {
    const F32 y = keep(Row::at(row, c, part), part);
    most = larger(most, magnitude(y));
    if (kept) put(kept + c, y, kFloat32, part);
  });
  return largest(most);
}

// Codes of a normalized row, which lies in `kept` or is normalized again.
template <class Row>
FASTDIFF_ALWAYS void write_codes(const Row& row, int64_t n, const float* kept, float inverse, char* out) {
  if (kept && inverse <= 0x1p127f) return quantize_as<kFloat32>(out, (const char*)kept, n, inverse, 0, false);
  each_vector(n, [&](int64_t c, auto part) { put(out + c, Row::at(row, c, part) * inverse, kInt8, part); });
}

template <class Row>
FASTDIFF_ALWAYS void write_codes(const Row* rows, int count, int64_t n, float* scales, char* out) {
  alignas(64) float kept[kKept];
  float* const keeps = n <= kKept ? kept : nullptr;
  CodeScale s[kTogether];
  for (int i = 0; i < count; ++i) s[i] = code_scale(normalize(rows[i], n, keeps ? keeps + i * n : keeps));
  for (int i = 0; i < count; ++i) {
    write_codes(rows[i], n, keeps ? keeps + i * n : keeps, s[i].inverse, out + i * n);
    scales[i] = s[i].scale;
  }
}

// What a row of the result is made of: x, or the sum x + gate * y, which it writes.
template <int kType>
FASTDIFF_ALWAYS const void* source(const NormModulate& t, const Affines& affines, int64_t r) {
  const int64_t b = r / t.tokens, n = r % t.tokens;
  const void* const x = element(t.x.data, b * t.x.stride_b + n * t.x.stride_n, kType);
  if (!t.y.data) return x;
  void* const sum = element(t.sum, r * t.channels, kType);
  const void* const y = element(t.y.data, b * t.y.stride_b + n * t.y.stride_n, t.y.type);
  add_gated<kType>(t, x, y, t.gate.data ? affines.of(b).gate : nullptr, sum);
  return sum;
}

template <int kType, bool kAffine>
FASTDIFF_ALWAYS void find_rows(const NormModulate& t, const Affines& affines, int64_t first, int count,
                               Normed<kType, kAffine>* rows) {
  const void* x[kTogether];
  Moments m[kTogether];
  for (int i = 0; i < count; ++i) x[i] = source<kType>(t, affines, first + i);
  if (t.centred) {
    moments<kType>(x, count, t.channels, m);
  } else {
    for (int i = 0; i < count; ++i) m[i] = {0.0f, 0.0f, mean_square<kType>(x[i], t.channels)};
  }
  for (int i = 0; i < count; ++i) {
    const Affine affine = kAffine ? affines.of((first + i) / t.tokens) : Affine{nullptr, nullptr, nullptr};
    rows[i] = {x[i], m[i].mean, m[i].rest, inverse_root(m[i].variance + t.eps), affine};
  }
}

template <int kType, int kOut, bool kAffine>
static void run_rows(const NormModulate& t, const Affines& affines) {
  const int64_t C = t.channels, total = t.batch * t.tokens * C;
  const bool past = total * size_of(kOut) >= kPastCaches && C % kFloats == 0 && (uintptr_t)t.out % kBytes == 0;
  const int64_t together = past || C > kShort ? 1 : kTogether;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += together) {
      const int count = int(end - r < together ? end - r : together);
      Normed<kType, kAffine> rows[kTogether];
      find_rows<kType, kAffine>(t, affines, r, count, rows);
      char* const out = element(t.out, r * C, kOut);
      if (kOut == kInt8) {
        write_codes(rows, count, C, t.scales + r, out);
        continue;
      }
      for (int i = 0; i < count; ++i) {
        const Normed<kType, kAffine> row = rows[i];  // in registers: stores to `out` may not change it
        const void* const next = t.y.data ? row.x : element(row.x, t.x.stride_n, kType);
        write_row<kType, kOut>(row, C, element(out, i * C, kOut), past, next);
      }
    }
    _mm_sfence();
  };
  parallel_for(t.batch * t.tokens, total < kSerial / 8, body);
}

void norm_modulate(const NormModulate& t) {
  const Affines affines = prepare(t);
  with_float(t.x.type, [&](auto in) {
    with_stored(t.out_type, [&](auto out) {
      constexpr int kType = decltype(in)::value, kOut = decltype(out)::value;
      if (affines.data) {
        run_rows<kType, kOut, true>(t, affines);
      } else {
        run_rows<kType, kOut, false>(t, affines);
      }
    });
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
