#include "cpu/linear_attention.h"

#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kTokens = 64;  // summed in registers; the sums of such groups are added up
constexpr int kLines = kFloats == 16 ? 8 : 4;  // of a result that are in registers, times two vectors
constexpr int64_t kWide = 2 * kFloats;
constexpr int kWorkspace = 7;

// NaN stays
FASTDIFF_ALWAYS F32 positive(F32 v) { return v < 0.0f ? F32{} : v; }

// n elements as float32, with zeros up to `wide`
template <int kType, bool kPositive>
FASTDIFF_ALWAYS void widen_head(float* to, const void* from, int64_t n, int64_t wide) {
  for (int64_t i = n / kFloats * kFloats; i < wide; i += kFloats) store(to + i, F32{});
  each_vector(n, [&](int64_t i, auto part) {
    const F32 v = fetch(element(from, i, kType), kType, part);
    put(to + i, kPositive ? positive(v) : v, kFloat32, part);
  });
}

// out[line][0, kWide) += the sum over `steps` of a[line * line_stride + step * step_stride] * b[step * wide], kLines lines
FASTDIFF_ALWAYS void multiply(float* out, const float* a, int64_t line_stride, int64_t step_stride, const float* b,
                              int64_t wide, int64_t steps) {
  F32 sum[kLines][2] = {};
  for (int64_t s = 0; s < steps; ++s) {
    const F32 first = load<F32>(b + s * wide), second = load<F32>(b + s * wide + kFloats);
    FASTDIFF_UNROLL
    for (int l = 0; l < kLines; ++l) {
      const F32 factor = splat(a[l * line_stride + s * step_stride]);
      sum[l][0] = multiply_add(factor, first, sum[l][0]);
      sum[l][1] = multiply_add(factor, second, sum[l][1]);
    }
  }
  FASTDIFF_UNROLL
  for (int l = 0; l < kLines; ++l) {
    float* const to = out + l * wide;
    store(to, load<F32>(to) + sum[l][0]);
    store(to + kFloats, load<F32>(to + kFloats) + sum[l][1]);
  }
}

// What one task works in: `wide` is the head dimension with padding.
struct Scratch {
  int64_t wide;
  float *products, *total, *a, *b;

  static int64_t floats(int64_t wide) { return wide * wide + wide + 2 * kTokens * wide; }
  Scratch(float* at, int64_t wide)
      : wide(wide), products(at), total(at + wide * wide), a(total + wide), b(a + kTokens * wide) {}
};

FASTDIFF_ALWAYS const char* head(const LinearAttention::Heads& x, int64_t b, int64_t n, int64_t h, int type) {
  return element(x.data, b * x.stride_b + n * x.stride_n + h * x.stride_h, type);
}

// products[i][j] = the sum over keys of relu(k[i]) * v[j]; total[i] = that of relu(k[i])
template <int kType>
static void gather(const LinearAttention& t, const Scratch& s, int64_t b, int64_t h) {
  memset(s.products, 0, size_t(s.wide * s.wide + s.wide) * sizeof(float));
  for (int64_t first = 0; first < t.keys; first += kTokens) {
    const int64_t n = t.keys - first < kTokens ? t.keys - first : kTokens;
    for (int64_t i = 0; i < n; ++i) {
      widen_head<kType, true>(s.a + i * s.wide, head(t.k, b, first + i, h, kType), t.dim, s.wide);
      widen_head<kType, false>(s.b + i * s.wide, head(t.v, b, first + i, h, kType), t.dim, s.wide);
    }
    for (int64_t c = 0; c < s.wide; c += kFloats) {
      F32 sum = {};
      for (int64_t i = 0; i < n; ++i) sum = sum + load<F32>(s.a + i * s.wide + c);
      store(s.total + c, load<F32>(s.total + c) + sum);
    }
    for (int64_t l = 0; l < s.wide; l += kLines)
      for (int64_t c = 0; c < s.wide; c += kWide)
        multiply(s.products + l * s.wide + c, s.a + l, 1, s.wide, s.b + c, s.wide, n);
  }
}

// out = relu(q) products / (relu(q) total + eps)
template <int kType>
static void apply(const LinearAttention& t, const Scratch& s, int64_t b, int64_t h) {
  for (int64_t first = 0; first < t.queries; first += kTokens) {
    const int64_t n = t.queries - first < kTokens ? t.queries - first : kTokens, lines = (n + kLines - 1) / kLines * kLines;
    memset(s.b, 0, size_t(lines * s.wide) * sizeof(float));
    memset(s.a + n * s.wide, 0, size_t((lines - n) * s.wide) * sizeof(float));
    for (int64_t i = 0; i < n; ++i)
      widen_head<kType, true>(s.a + i * s.wide, head(t.q, b, first + i, h, kType), t.dim, s.wide);
    for (int64_t l = 0; l < lines; l += kLines)
      for (int64_t c = 0; c < s.wide; c += kWide)
        multiply(s.b + l * s.wide + c, s.a + l * s.wide, s.wide, 1, s.products + c, s.wide, t.dim);
    for (int64_t i = 0; i < n; ++i) {
      F32 sum = {};
      for (int64_t c = 0; c < s.wide; c += kFloats)
        sum = multiply_add(load<F32>(s.a + i * s.wide + c), load<F32>(s.total + c), sum);
      const F32 share = splat(1.0f / (join_lanes(sum) + t.eps));
      char* out = element(t.out, ((b * t.queries + first + i) * t.heads + h) * t.dim, kType);
      each_vector(t.dim, [&](int64_t c, auto part) {
        put_result(element(out, c, kType), load<F32>(s.b + i * s.wide + c) * share, kType, part);
      });
    }
  }
}

void linear_attention(const LinearAttention& t) {
  const int64_t wide = (t.dim + kWide - 1) / kWide * kWide, tasks = t.batch * t.heads, each = Scratch::floats(wide);
  float* const scratch = (float*)workspace(kWorkspace, size_t(tasks * each) * sizeof(float));
  auto body = [&](int64_t begin, int64_t end) {
    const Scratch s(scratch + begin * each, wide);  // of this thread
    for (int64_t task = begin; task < end; ++task) {
      with_float(t.type, [&](auto in) {
        constexpr int kType = decltype(in)::value;
        gather<kType>(t, s, task / t.heads, task % t.heads);
        apply<kType>(t, s, task / t.heads, task % t.heads);
      });
    }
  };
  parallel_for(tasks, tasks * (t.queries + t.keys) * t.dim * t.dim < kSerial, body);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
