#include "cpu/norm_modulate.h"

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

constexpr int64_t kKept = 4096;  // channels of a normalized row that fit in the first cache

// Longer rows are normalized twice.
template <class Row>
FASTDIFF_ALWAYS float write_codes(const Row& row, int64_t n, void* out) {
  alignas(64) float kept[kKept];
  const bool keeps = n <= kKept;
  I32 most{};
  each_vector(n, [&](int64_t c, auto part) {
    const F32 y = keep(Row::at(row, c, part), part);
    most = larger(most, magnitude(y));
    if (keeps) put(kept + c, y, kFloat32, part);
  });
  const CodeScale s = code_scale(largest(most));
  each_vector(n, [&](int64_t c, auto part) {
    const F32 y = keeps ? fetch(kept + c, kFloat32, part) : Row::at(row, c, part);
    put((int8_t*)out + c, y * s.inverse, kInt8, part);
  });
  return s.scale;
}

template <int kType, int kOut, bool kAffine>
static void run_rows(const NormModulate& t, const Affines& affines) {
  const int64_t C = t.channels, total = t.batch * t.tokens * C;
  const bool past = total * size_of(kOut) >= kPastCaches && C % kFloats == 0 && (uintptr_t)t.out % kBytes == 0;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / t.tokens, n = r % t.tokens;
      const void* x = element(t.x.data, b * t.x.stride_b + n * t.x.stride_n, kType);
      const Affine affine = kAffine ? affines.of(b) : Affine{nullptr, nullptr, nullptr};
      if (t.y.data) {
        void* sum = element(t.sum, r * C, kType);
        const void* y = element(t.y.data, b * t.y.stride_b + n * t.y.stride_n, t.y.type);
        add_gated<kType>(t, x, y, t.gate.data ? affine.gate : nullptr, sum);
        x = sum;
      }
      const Moments m = t.centred ? moments<kType>(x, C) : Moments{0.0f, 0.0f, mean_square<kType>(x, C)};
      const Normed<kType, kAffine> row{x, m.mean, m.rest, inverse_root(m.variance + t.eps), affine};
      void* out = element(t.out, r * C, kOut);
      if (kOut == kInt8) {
        t.scales[r] = write_codes(row, C, out);
      } else {
        write_row<kType, kOut>(row, C, out, past, t.y.data ? x : element(x, t.x.stride_n, kType));
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
