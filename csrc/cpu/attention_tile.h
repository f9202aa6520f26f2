// One tile of attention: NV vectors of queries, one query per lane, against all keys in blocks of kKeys. Scores, maxima,
// probabilities and sums of a query stay in its lane, so nothing is reduced across lanes.
#pragma once
#include "cpu/attention_pack.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

// Memory of a tile, on the stack of its thread. Vectors of NV * kFloats lanes throughout.
struct Scratch {
  uint32_t* q;    // [units]
  float* scores;  // [kKeys]; probabilities take their place
  float* out;     // [channels]
};

// sum[r][j] += sum over s of lanes[s][j] * a[r * row + s * next]
template <class Mode, int ROWS, int NV>
FASTDIFF_ALWAYS void multiply(typename Mode::Sum (&sum)[ROWS][NV], const uint32_t* a, int64_t row, int64_t next, const uint32_t* lanes, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    U32 x[NV];
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) x[j] = load<U32>(lanes + (s * NV + j) * kFloats);
    FASTDIFF_UNROLL for (int r = 0; r < ROWS; ++r) {
      const U32 unit = U32{} + a[r * row + s * next];
      FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) sum[r][j] = Mode::add(sum[r][j], x[j], unit);
    }
  }
}

// Scores of ROWS keys; `most` becomes the largest so far of each query, counting the first `valid` keys.
template <class Mode, int ROWS, int NV>
FASTDIFF_ALWAYS void score(float* scores, const Head& h, int64_t key, int64_t units, const uint32_t* q, int valid, F32 (&most)[NV]) {
  typename Mode::Sum sum[ROWS][NV];
  FASTDIFF_UNROLL for (int r = 0; r < ROWS; ++r)
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) sum[r][j] = Mode::start(Mode::kOffset ? h.start[key + r] : 0);
  multiply<Mode, ROWS, NV>(sum, h.k + key * units, units, 1, q, units);
  FASTDIFF_UNROLL for (int r = 0; r < ROWS; ++r) {
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) {
      F32 s = Mode::to_float(sum[r][j]);
      if (Mode::kCodes) s = s * h.scale[key + r];
      store(scores + (r * NV + j) * kFloats, s);
      if (r < valid) most[j] = larger(most[j], s);
    }
  }
}

template <class Mode, int NV>
static __attribute__((noinline)) void score_block(float* scores, const Head& h, int64_t units, const uint32_t* q, int64_t first, int64_t count, F32 (&most)[NV]) {
  F32 best[NV];
  FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) best[j] = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows)
    score<Mode, kRows, NV>(scores + i * NV * kFloats, h, first + i, units, q, kRows, best);
  for (; i < count; i += 4)
    score<Mode, 4, NV>(scores + i * NV * kFloats, h, first + i, units, q, count - i < 4 ? int(count - i) : 4, best);
  FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) most[j] = best[j];
}

// Scores of `count` keys to units of probabilities in their place: 2^(score * factor - top). Adds them to `total`: as they
// were rounded, or, for codes, before that: what 1/255 cannot show would be missing (SQNR 19 instead of 30 dB at 4096 keys).
template <class Mode, int NV>
static __attribute__((noinline)) void weigh(float* scores, int64_t count, const F32 (&factor)[NV], const F32 (&top)[NV], F32 (&total)[NV]) {
  constexpr int step = Mode::kStep;
  typename Mode::Sum sum[NV];
  F32 base[NV], exact[NV];
  FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) sum[j] = Mode::start(0), exact[j] = F32{};
  FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) base[j] = (Mode::kCodes ? kLog2Of255 : 0.0f) - top[j];
  auto group = [&](int64_t g, int64_t valid) __attribute__((always_inline)) {
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) {
      F32 p[step] = {};
      FASTDIFF_UNROLL for (int r = 0; r < step; ++r) {
        if (r >= valid) continue;
        const F32 s = load<F32>(scores + ((g * step + r) * NV + j) * kFloats);
        p[r] = exponential<Mode::kExact>(fused(s, factor[j], base[j]));
        if (Mode::kCodes) exact[j] = exact[j] + p[r];
      }
      const U32 unit = Mode::weights(p);
      if (!Mode::kCodes) sum[j] = Mode::count(sum[j], unit);
      store((uint32_t*)scores + (g * NV + j) * kFloats, unit);
    }
  };
  for (int64_t g = 0; g < count / step; ++g) group(g, step);
  if (count % step) group(count / step, count % step);
  FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) total[j] = total[j] + (Mode::kCodes ? exact[j] : Mode::to_float(sum[j]));
}

// out[r] = out[r] * shrink + products of ROWS channels
template <class Mode, int ROWS, int NV>
FASTDIFF_ALWAYS void mix(float* out, const uint32_t* v, const uint32_t* p, int64_t steps, const F32 (&shrink)[NV]) {
  typename Mode::Sum sum[ROWS][NV];
  FASTDIFF_UNROLL for (int r = 0; r < ROWS; ++r)
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) sum[r][j] = Mode::start(0);
  multiply<Mode, ROWS, NV>(sum, v, 1, ROWS, p, steps);
  FASTDIFF_UNROLL for (int r = 0; r < ROWS; ++r)
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) {
      float* to = out + (r * NV + j) * kFloats;
      store(to, fused(load<F32>(to), shrink[j], Mode::to_float(sum[r][j])));
    }
}

template <class Mode, int NV>
static __attribute__((noinline)) void mix_block(float* out, const uint32_t* v, const uint32_t* p, int64_t channels, int64_t count, const F32 (&shrink)[NV]) {
  const int64_t steps = (count + Mode::kStep - 1) / Mode::kStep;
  F32 times[NV];
  FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) times[j] = shrink[j];
  int64_t c = 0;
  for (; c + kRows <= channels; c += kRows) mix<Mode, kRows, NV>(out + c * NV * kFloats, v + c * steps, p, steps, times);
  if (c < channels) mix<Mode, 4, NV>(out + c * NV * kFloats, v + c * steps, p, steps, times);
}

// Transposes kFloats vectors.
FASTDIFF_ALWAYS void transpose(U32 (&rows)[kFloats]) {
  I32 lane = {};
  for (int i = 0; i < kFloats; ++i) lane[i] = i;
  FASTDIFF_UNROLL for (int h = 1; h < kFloats; h *= 2) {
    const I32 odd = (lane & h) != 0;
    const I32 low = odd ? lane - h + kFloats : lane, high = odd ? lane + kFloats : lane + h;
    _Pragma("GCC unroll 16") for (int i = 0; i < kFloats; ++i) {
      if (i & h) continue;
      const U32 a = rows[i], b = rows[i + h];
      rows[i] = __builtin_shuffle(a, b, (U32)low);
      rows[i + h] = __builtin_shuffle(a, b, (U32)high);
    }
  }
}

#if defined(__AVX512F__)

constexpr int64_t kEight = 8;  // channels of 16 bytes in bfloat16

// Whether 16 rows from `first` on exist and consist of eights of channels: 16 bytes of bfloat16.
FASTDIFF_ALWAYS bool is_in_eights(const Attention& t, int64_t first) {
  return t.dim % kEight == 0 && first + kFloats <= t.queries;
}

template <int kType>
FASTDIFF_ALWAYS __m128i load_eight(const char* from) {
  if constexpr (kType == kBFloat16) return _mm_loadu_si128((const __m128i*)from);
  return (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps((const float*)from));
}

// Transposes 4 x 4 lanes within each 16 bytes: vector k of rows k, 4 + k, 8 + k, 12 + k becomes unit k of all rows in
// order, and the other way round.
FASTDIFF_ALWAYS void transpose_quarters(__m512i (&v)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
  const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(a, b);
  v[1] = _mm512_unpackhi_epi64(a, b);
  v[2] = _mm512_unpacklo_epi64(c, d);
  v[3] = _mm512_unpackhi_epi64(c, d);
}

// Units of 16 queries of bfloat16 or float32; `next` bytes from one to the next, NV vectors from unit to unit.
template <int kType, int NV>
FASTDIFF_ALWAYS void copy_queries(uint32_t* to, const char* from, int64_t next, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kEight) {
    __m512i v[4];
    FASTDIFF_UNROLL for (int k = 0; k < 4; ++k) {
      const char* row = from + k * next + d * size_of(kType);
      const auto part = [&](int l) { return load_eight<kType>(row + 4 * l * next); };
      v[k] = _mm512_broadcast_i32x4(part(0));
      v[k] = _mm512_mask_broadcast_i32x4(v[k], 0x00f0, part(1));
      v[k] = _mm512_mask_broadcast_i32x4(v[k], 0x0f00, part(2));
      v[k] = _mm512_mask_broadcast_i32x4(v[k], 0xf000, part(3));
    }
    transpose_quarters(v);
    FASTDIFF_UNROLL for (int k = 0; k < 4; ++k) store(to + (d / 2 + k) * NV * kFloats, v[k]);
  }
}

// value(d) is channel d of 16 rows; they go to `to` as bfloat16 or float32, `next` bytes from one to the next.
template <int kType, class Value>
FASTDIFF_ALWAYS void write_eights(char* to, int64_t next, int64_t dim, Value value) {
  constexpr int kChannels = 16 / size_of(kType);  // of 16 bytes
  for (int64_t d = 0; d < dim; d += kChannels) {
    __m512i v[4];
    FASTDIFF_UNROLL for (int k = 0; k < 4; ++k) {
      if constexpr (kType == kBFloat16) {
        const F32 pair[2] = {value(d + 2 * k), value(d + 2 * k + 1)};
        v[k] = (__m512i)BrainMode::join(pair);
      } else {
        v[k] = (__m512i)value(d + k);
      }
    }
    transpose_quarters(v);
    FASTDIFF_UNROLL for (int k = 0; k < 4; ++k) {
      char* row = to + k * next + d * size_of(kType);
      _mm_storeu_si128((__m128i*)row, _mm512_castsi512_si128(v[k]));
      _mm_storeu_si128((__m128i*)(row + 4 * next), _mm512_extracti32x4_epi32(v[k], 1));
      _mm_storeu_si128((__m128i*)(row + 8 * next), _mm512_extracti32x4_epi32(v[k], 2));
      _mm_storeu_si128((__m128i*)(row + 12 * next), _mm512_extracti32x4_epi32(v[k], 3));
    }
  }
}

#endif

// Units of the queries from q0 on, and in `scale` what their scores are to be multiplied with; NaN where a query is not finite.
template <class Mode, int NV>
static void pack_queries(const Attention& t, const Layout<Mode>& l, int64_t b, int64_t head, int64_t q0, uint32_t* to, float* scale) {
  const float sign = t.scale < 0 ? -1.0f : 1.0f, size = t.scale * sign * kLog2E;
  float factor[NV * kFloats];
  for (int i = 0; i < NV * kFloats; ++i) {
    factor[i] = sign;
    scale[i] = size;
    if (!Mode::kCodes || q0 + i >= t.queries) continue;
    const float amax = magnitude(element(t.q, t.type, b, q0 + i, head), t.dim, t.type, nullptr);
    factor[i] = sign * inverse(amax);
    scale[i] = size * (amax * (1.0f / 127.0f));
  }
  for (int j = 0; j < NV; ++j) {
#if defined(__AVX512F__)
    if (__is_same(Mode, BrainMode) && sign > 0 && t.type != kFloat16 && is_in_eights(t, q0 + j * kFloats)) {
      const char* from = element(t.q, t.type, b, q0 + j * kFloats, head);
      const int64_t next = t.q.token * size_of(t.type);
      if (t.type == kFloat32) {
        copy_queries<kFloat32, NV>(to + j * kFloats, from, next, t.dim);
      } else {
        copy_queries<kBFloat16, NV>(to + j * kFloats, from, next, t.dim);
      }
      continue;
    }
#endif
    for (int64_t u = 0; u < l.units; u += kFloats) {
      U32 rows[kFloats];
      _Pragma("GCC unroll 16") for (int i = 0; i < kFloats; ++i) {
        const int64_t query = q0 + j * kFloats + i;
        rows[i] = U32{};
        if (query < t.queries)
          rows[i] = row_units<Mode>(element(t.q, t.type, b, query, head), u * Mode::kStep, t.dim, t.type, nullptr, factor[j * kFloats + i]);
        if (Mode::kOffset) rows[i] = rows[i] ^ 0x80808080u;
      }
      transpose(rows);
      for (int64_t i = 0; i < kFloats && u + i < l.units; ++i) store(to + ((u + i) * NV + j) * kFloats, rows[i]);
    }
  }
}

FASTDIFF_ALWAYS float log2_of(float x) { return __builtin_log2f(x); }

template <class Mode, int NV>
static void finish(const Attention& t, const Head& h, int64_t b, int64_t head, int64_t q0, const float* out, const F32 (&total)[NV]) {
  for (int j = 0; j < NV; ++j) {
    const F32 empty = (F32)(total[j] == 0.0f), share = (F32)((U32)(1.0f / total[j]) & ~(U32)empty);
    const auto channel = [&](int64_t d) __attribute__((always_inline)) {
      const F32 x = load<F32>(out + (d * NV + j) * kFloats) * share;
      if (!Mode::kCodes) return x;
      return (F32)((U32)fused(x, splat(h.value_scale[d]), splat(h.value_mean[d])) & ~(U32)empty);
    };
#if defined(__AVX512F__)
    if (t.type != kFloat16 && is_in_eights(t, q0 + j * kFloats)) {
      const int64_t head_bytes = t.dim * size_of(t.type), next = t.heads * head_bytes;
      char* const to = (char*)t.out + (b * t.queries + q0 + j * kFloats) * next + head * head_bytes;
      if (t.type == kFloat32) {
        write_eights<kFloat32>(to, next, t.dim, channel);
      } else {
        write_eights<kBFloat16>(to, next, t.dim, channel);
      }
      continue;
    }
#endif
    for (int64_t d = 0; d < t.dim; d += kFloats) {
      U32 rows[kFloats];
      _Pragma("GCC unroll 16") for (int i = 0; i < kFloats; ++i) rows[i] = d + i < t.dim ? (U32)channel(d + i) : U32{};
      transpose(rows);
      for (int64_t i = 0; i < kFloats && q0 + j * kFloats + i < t.queries; ++i) {
        const int64_t row = (b * t.queries + q0 + j * kFloats + i) * t.heads + head;
        store_some((char*)t.out + (row * t.dim + d) * size_of(t.type), (F32)rows[i], t.dim - d, t.type);
      }
    }
  }
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
