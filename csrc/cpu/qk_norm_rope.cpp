#include "cpu/qk_norm_rope.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

FASTDIFF_ALWAYS const void* row_of(const QkNormRope::Rows& r, int64_t b, int64_t n, int64_t h) {
  return r.data ? element(r.data, b * r.stride_b + n * r.stride_n + h * r.stride_h, r.type) : nullptr;
}

// n elements of any type as float32
static void widen_row(float* to, const void* from, int type, int64_t n) {
  with_float(type, [&](auto in) {
    constexpr int kType = decltype(in)::value;
    each_vector(n, [&](int64_t i, auto part) { put(to + i, fetch(element(from, i, kType), kType, part), kFloat32, part); });
  });
}

// In pairs of lanes, (a, b) becomes (-b, a).
FASTDIFF_ALWAYS F32 turn_pairs(F32 v) {
  I32 order;
  U32 sign;
  FASTDIFF_UNROLL16
  for (int l = 0; l < kFloats; ++l) {
    order[l] = l ^ 1;
    sign[l] = l & 1 ? 0u : 0x80000000u;
  }
  return (F32)((U32)__builtin_shuffle(v, order) ^ sign);
}

// What a token's heads share.
struct Rotation {
  bool exists;
  alignas(64) float cosine[kMaxHeadDim], sine[kMaxHeadDim];
};

template <int kOut>
FASTDIFF_ALWAYS void write_head(const QkNormRope& t, const float* x, const Rotation& r, void* out) {
  const int64_t D = t.dim, half = D / 2;
  auto rotated = [&](int64_t i, F32 v, F32 turned, auto part) {
    const F32 y = v * fetch(r.cosine + i, kFloat32, part) + turned * fetch(r.sine + i, kFloat32, part);
    put_result(element(out, i, kOut), y, kOut, part);
  };
  if (!r.exists) {
    each_vector(D, [&](int64_t i, auto part) { put_result(element(out, i, kOut), fetch(x + i, kFloat32, part), kOut, part); });
  } else if (t.interleaved) {
    each_vector(D, [&](int64_t i, auto part) {
      const F32 v = fetch(x + i, kFloat32, part);
      rotated(i, v, turn_pairs(v), part);
    });
  } else {
    each_vector(half, [&](int64_t i, auto part) {
      const F32 low = fetch(x + i, kFloat32, part), high = fetch(x + half + i, kFloat32, part);
      rotated(i, low, -high, part);
      rotated(half + i, high, low, part);
    });
  }
}

static void run_token(const QkNormRope& t, const float* weight, int64_t b, int64_t n) {
  const int64_t D = t.dim;
  alignas(64) float x[kMaxHeadDim];
  Rotation r;
  r.exists = t.cosine.data != nullptr;
  if (r.exists) {
    widen_row(r.cosine, row_of(t.cosine, b, n, 0), t.cosine.type, D);
    widen_row(r.sine, row_of(t.sine, b, n, 0), t.sine.type, D);
  }
  for (int64_t h = 0; h < t.heads; ++h) {
    widen_row(x, row_of(t.x, b, n, h), t.x.type, D);
    const float factor = t.normalizes ? inverse_root(mean_square<kFloat32>(x, D) + t.eps) : 1.0f;
    each_vector(D, [&](int64_t i, auto part) {
      put(x + i, fetch(x + i, kFloat32, part) * factor * fetch(weight + i, kFloat32, part), kFloat32, part);
    });
    with_float(t.out_type, [&](auto out) {
      constexpr int kOut = decltype(out)::value;
      write_head<kOut>(t, x, r, element(t.out, ((b * t.tokens + n) * t.heads + h) * D, kOut));
    });
  }
}

void qk_norm_rope(const QkNormRope& t) {
  auto body = [&](int64_t begin, int64_t end) {
    alignas(64) float weight[kMaxHeadDim];
    for (int64_t i = 0; i < t.dim; ++i) weight[i] = 1.0f;
    if (t.weight.data) widen_row(weight, t.weight.data, t.weight.type, t.dim);
    for (int64_t k = begin; k < end; ++k) run_token(t, weight, k / t.tokens, k % t.tokens);
  };
  parallel_for(t.batch * t.tokens, t.batch * t.tokens * t.heads * t.dim < kSerial / 2, body);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
