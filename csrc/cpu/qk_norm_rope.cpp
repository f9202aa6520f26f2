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

constexpr int64_t kAhead = 2 << 10;  // bytes that are fetched ahead of what is written

// Heads whose norms are found before they are written, so that their last sums overlap: bfloat16 takes 4.0 ms instead of
// 5.4 (4608 tokens, 24 heads of 128, twice; Zen 4). float32 waits for memory.
template <int kIn>
constexpr int64_t kTogether = kIn == kFloat32 ? 1 : 32;

// One head of a token: its elements, and what they are multiplied by before they turn.
template <int kIn>
struct HeadRow {
  const void* x;
  float factor;
  const float* weight;
  int64_t ahead;  // bytes to the heads that come after those whose norms are known

  template <class P>
  FASTDIFF_ALWAYS F32 at(const HeadRow& h, int64_t i, P part) {
    // while results are written: the sums in front of them leave memory idle otherwise
    prefetch(element(h.x, i, kIn) + h.ahead);
    return fetch(element(h.x, i, kIn), kIn, part) * h.factor * fetch(h.weight + i, kFloat32, part);
  }
};

template <int kIn, int kOut>
FASTDIFF_ALWAYS void write_head(const QkNormRope& t, const HeadRow<kIn>& head, const Rotation& r, void* out, bool past) {
  const int64_t D = t.dim, half = D / 2;
  auto write = [&](int64_t i, F32 y, auto part) { put_either(element(out, i, kOut), y, kOut, past, part); };
  auto rotated = [&](int64_t i, F32 v, F32 turned, auto part) {
    write(i, v * fetch(r.cosine + i, kFloat32, part) + turned * fetch(r.sine + i, kFloat32, part), part);
  };
  if (!r.exists) {
    each_vector(D, [&](int64_t i, auto part) { write(i, HeadRow<kIn>::at(head, i, part), part); });
  } else if (t.interleaved) {
    each_vector(D, [&](int64_t i, auto part) {
      const F32 v = HeadRow<kIn>::at(head, i, part);
      rotated(i, v, turn_pairs(v), part);
    });
  } else {
    each_vector(half, [&](int64_t i, auto part) {
      const F32 low = HeadRow<kIn>::at(head, i, part), high = HeadRow<kIn>::at(head, half + i, part);
      rotated(i, low, -high, part);
      rotated(half + i, high, low, part);
    });
  }
}

template <int kIn, int kOut>
static void run_token(const QkNormRope& t, const float* weight, int64_t b, int64_t n, bool past) {
  Rotation r;
  r.exists = t.cosine.data != nullptr;
  if (r.exists) {
    widen_row(r.cosine, row_of(t.cosine, b, n, 0), t.cosine.type, t.dim);
    widen_row(r.sine, row_of(t.sine, b, n, 0), t.sine.type, t.dim);
  }
  constexpr int64_t kCount = kTogether<kIn>;
  const int64_t next = (t.heads <= kCount ? t.x.stride_n : kCount * t.x.stride_h) * size_of(kIn);
  const int64_t ahead = kCount == 1 ? kAhead : next;
  for (int64_t first = 0; first < t.heads; first += kCount) {
    const int64_t end = first + kCount < t.heads ? first + kCount : t.heads;
    float factor[kCount];
    for (int64_t h = first; h < end; ++h)
      factor[h - first] = t.normalizes ? inverse_root(mean_square<kIn>(row_of(t.x, b, n, h), t.dim) + t.eps) : 1.0f;
    for (int64_t h = first; h < end; ++h) {
      void* out = element(t.out, ((b * t.tokens + n) * t.heads + h) * t.dim, kOut);
      write_head<kIn, kOut>(t, {row_of(t.x, b, n, h), factor[h - first], weight, ahead}, r, out, past);
    }
  }
}

template <int kIn, int kOut>
static void run(const QkNormRope& t) {
  const int64_t total = t.batch * t.tokens * t.heads * t.dim;
  const bool past = total * size_of(kOut) >= kPastCaches && (uintptr_t)t.out % kBytes == 0 && t.dim % (2 * kFloats) == 0;
  auto body = [&](int64_t begin, int64_t end) {
    alignas(64) float weight[kMaxHeadDim];
    for (int64_t i = 0; i < t.dim; ++i) weight[i] = 1.0f;
    if (t.weight.data) widen_row(weight, t.weight.data, t.weight.type, t.dim);
    for (int64_t k = begin; k < end; ++k) run_token<kIn, kOut>(t, weight, k / t.tokens, k % t.tokens, past);
    _mm_sfence();
  };
  parallel_for(t.batch * t.tokens, total < kSerial / 2, body);
}

void qk_norm_rope(const QkNormRope& t) {
  with_float(t.x.type, [&](auto in) {
    with_float(t.out_type, [&](auto out) { run<decltype(in)::value, decltype(out)::value>(t); });
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
