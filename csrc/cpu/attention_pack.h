// Brings queries, keys and values of any type and strides into the units of attention_modes.h.
//
//   keys     a row of units per key, rows padded with zeros to a multiple of kRows
//   values   per block of kKeys keys: panels of kRows channels (the last may have 4), kRows units for each kStep keys
//   queries  for each unit of the head dimension: NV vectors of one query per lane
//
// Codes: the mean of the keys over the tokens is subtracted from each key, which softmax does not see; a key has its own
// scale. Values lose their mean per channel, which is added to the result, and have a scale per channel.
#pragma once
#include "cpu/attention.h"
#include "cpu/attention_modes.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int64_t kKeys = 128;  // of a block: its scores, probabilities and units stay in the first caches
constexpr int kRows = kFloats == 16 ? 8 : 4;
constexpr int64_t kMostDim = (kAttentionDim + 15) / 16 * 16;
constexpr float kLog2E = 1.44269504f;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What belongs to one head of keys and values, in the workspace.
struct Head {
  uint32_t *k, *v;
  float *scale;                   // of each key
  int32_t *start;                 // of each key: what the sum of its products starts with
  float *mean, *value_scale, *value_mean;  // [padded dim]
  float* partial;                 // per block: sums of keys and values, least and largest value, each [padded dim]
};

template <class Mode>
struct Layout {
  int64_t dim, channels, units, keys, padded_dim, blocks;

  explicit Layout(const Attention& t)
      : dim(t.dim),
        channels(round_up(t.dim, 4)),
        units((t.dim + Mode::kStep - 1) / Mode::kStep),
        keys(round_up(t.keys, kRows)),
        padded_dim(round_up(t.dim, 16)),
        blocks((t.keys + kKeys - 1) / kKeys) {}

  // 4-byte words of a head; every part starts at a multiple of 64 bytes
  int64_t k_words() const { return round_up(keys * units, 16); }
  int64_t v_words() const { return round_up((keys + kKeys) / Mode::kStep * channels, 16); }
  int64_t words() const {
    return k_words() + v_words() + (Mode::kCodes ? 2 * round_up(keys, 16) + (3 + 4 * blocks) * padded_dim : 0);
  }

  Head head(uint32_t* base, int64_t index) const {
    uint32_t* at = base + index * words();
    Head h{at, at + k_words(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    h.scale = (float*)(h.v + v_words());
    h.start = (int32_t*)(h.scale + round_up(keys, 16));
    h.mean = (float*)(h.start + round_up(keys, 16));
    h.value_scale = h.mean + padded_dim;
    h.value_mean = h.value_scale + padded_dim;
    h.partial = h.value_mean + padded_dim;
    return h;
  }
};

FASTDIFF_ALWAYS const char* element(const Attention::Operand& x, int type, int64_t b, int64_t token, int64_t head) {
  return (const char*)x.data + (b * x.batch + token * x.token + head * x.head) * size_of(type);
}

// n elements, zeros after them where n < kFloats
#if defined(__AVX512F__)
FASTDIFF_ALWAYS F32 load_some(const char* from, int64_t n, int type) {
  if (n >= 16) return load_float(from, type);
  const __mmask16 kept = n <= 0 ? 0 : __mmask16((1u << n) - 1);
  if (type == kFloat32) return (F32)_mm512_maskz_loadu_ps(kept, from);
  const __m256i half = _mm256_maskz_loadu_epi16(kept, from);
  if (type == kFloat16) return (F32)_mm512_cvtph_ps(half);
  return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

FASTDIFF_ALWAYS void store_some(char* to, F32 value, int64_t n, int type) {
  const __mmask16 kept = n >= 16 ? 0xffff : __mmask16((1u << n) - 1);
  if (type == kFloat32) return _mm512_mask_storeu_ps(to, kept, (__m512)value);
  const __m256i half = type == kFloat16 ? _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT)
                                        : (__m256i)_mm512_cvtneps_pbh((__m512)value);
  if (n >= 16) return _mm256_storeu_si256((__m256i*)to, half);
  // in pairs: masked stores of 16-bit elements are microcode on Zen 4, and were a sixth of the time with 77 keys
  _mm256_mask_storeu_epi32(to, __mmask8((1u << n / 2) - 1), half);
  if (n % 2 == 0) return;
  alignas(32) uint16_t part[16];
  _mm256_store_si256((__m256i*)part, half);
  memcpy(to + 2 * (n - 1), part + n - 1, 2);
}

FASTDIFF_ALWAYS float largest_of(F32 v) { return _mm512_reduce_max_ps((__m512)v); }
FASTDIFF_ALWAYS float sum_of(F32 v) { return _mm512_reduce_add_ps((__m512)v); }
#else
FASTDIFF_ALWAYS F32 load_some(const char* from, int64_t n, int type) {
  if (n >= kFloats) return load_float(from, type);
  alignas(64) float part[kFloats] = {};
  if (n > 0) memcpy(part, from, size_t(n * size_of(type)));
  return load_float(part, type);
}

FASTDIFF_ALWAYS void store_some(char* to, F32 value, int64_t n, int type) {
  if (n >= kFloats) return store_float(to, value, type);
  alignas(64) float part[kFloats];
  store_float(part, value, type);
  memcpy(to, part, size_t(n * size_of(type)));
}

FASTDIFF_ALWAYS float largest_of(F32 v) {
  float out = v[0];
  for (int i = 1; i < kFloats; ++i) out = v[i] > out ? v[i] : out;
  return out;
}
FASTDIFF_ALWAYS float sum_of(F32 v) {
  float out = v[0];
  for (int i = 1; i < kFloats; ++i) out += v[i];
  return out;
}
#endif

// Elements [first, first + kFloats * kStep) of a row of `dim`, minus shift (or null), times factor.
template <class Mode>
FASTDIFF_ALWAYS U32 row_units(const char* row, int64_t first, int64_t dim, int type, const float* shift, float factor) {
  F32 parts[Mode::kStep];
  FASTDIFF_UNROLL for (int p = 0; p < Mode::kStep; ++p) {
    const int64_t d = first + p * kFloats;
    F32 x = load_some(row + d * size_of(type), dim - d, type);
    if (shift && d < dim) x = x - load<F32>(shift + d);
    parts[p] = x * factor;
  }
  return Mode::row(parts);
}

// Largest magnitude of row - shift; NaN where an element is not finite.
static float magnitude(const char* row, int64_t dim, int type, const float* shift) {
  F32 most = {}, poison = {};
  for (int64_t d = 0; d < dim; d += kFloats) {
    F32 x = load_some(row + d * size_of(type), dim - d, type);
    if (shift) x = x - load<F32>(shift + d);
    most = larger(larger(x, -x), most);
    poison = poison + x * 0.0f;
  }
  return largest_of(most) + sum_of(poison);
}

FASTDIFF_ALWAYS float inverse(float amax) { return amax > 0 ? 127.0f / amax : 0.0f; }

FASTDIFF_ALWAYS void store_units(uint32_t* to, U32 units, int64_t n) {
  if (n >= kFloats) return store(to, units);
#if defined(__AVX512F__)
  _mm512_mask_storeu_epi32(to, __mmask16((1u << n) - 1), (__m512i)units);
#else
  memcpy(to, &units, size_t(n) * 4);
#endif
}

// Sums of the keys and ranges of the values of one block: the first half of quantizing.
static void measure_block(const Attention& t, int64_t b, int64_t head, int64_t first, int64_t count, int64_t padded, float* out) {
  for (int64_t d = 0; d < t.dim; d += kFloats) {
    F32 keys = {}, values = {}, low = {}, high = {};
    for (int64_t i = 0; i < count; ++i) {
      const char* k = element(t.k, t.type, b, first + i, head) + d * size_of(t.type);
      const char* v = element(t.v, t.type, b, first + i, head) + d * size_of(t.type);
      const F32 x = load_some(v, t.dim - d, t.type);
      keys = keys + load_some(k, t.dim - d, t.type);
      values = values + x;
      low = i ? smaller(x, low) : x;
      high = i ? larger(x, high) : x;
    }
    store(out + d, keys);
    store(out + padded + d, values);
    store(out + 2 * padded + d, low);
    store(out + 3 * padded + d, high);
  }
}

// The same of all `count` keys, from the blocks in order: means of keys and values, scale of the values. A channel with a
// value that is not finite is NaN.
static void join_blocks(const float* partial, int64_t count, int64_t dim, int64_t padded, float* mean, float* scale, float* value_mean) {
  const int64_t blocks = (count + kKeys - 1) / kKeys;
  for (int64_t d = 0; d < dim; d += kFloats) {
    F32 keys = {}, values = {}, low = load<F32>(partial + 2 * padded + d), high = load<F32>(partial + 3 * padded + d);
    for (int64_t i = 0; i < blocks; ++i) {
      const float* p = partial + 4 * i * padded + d;
      keys = keys + load<F32>(p);
      values = values + load<F32>(p + padded);
      low = smaller(low, load<F32>(p + 2 * padded));
      high = larger(high, load<F32>(p + 3 * padded));
    }
    const F32 middle = values / splat(float(count));
    store(mean + d, keys / splat(float(count)));
    store(value_mean + d, middle);
    store(scale + d, larger(high - middle, middle - low) * (1.0f / 127.0f) + middle * 0.0f);
  }
}

template <class Mode>
static void pack_keys(const Attention& t, const Layout<Mode>& l, const Head& h, int64_t b, int64_t head, int64_t first, int64_t count, const float* mean) {
  for (int64_t i = first; i < first + count; ++i) {
    const char* row = element(t.k, t.type, b, i, head);
    float factor = 1.0f;
    if constexpr (Mode::kCodes) {
      const float amax = magnitude(row, t.dim, t.type, mean);
      factor = inverse(amax);
      h.scale[i] = amax * (1.0f / 127.0f);
    }
    typename Mode::Sum sum = Mode::start(0);
    for (int64_t u = 0; u < l.units; u += kFloats) {
      const U32 units = row_units<Mode>(row, u * Mode::kStep, t.dim, t.type, mean, factor);
      if (Mode::kOffset) sum = Mode::add(sum, U32{} + 0x01010101u, units);
      store_units(h.k + i * l.units + u, units, l.units - u);
    }
    if constexpr (Mode::kCodes) h.start[i] = Mode::kOffset ? -128 * int32_t(sum_of(Mode::to_float(sum))) : 0;
  }
  const int64_t end = first + count, padded = round_up(end, kRows);
  memset(h.k + end * l.units, 0, size_t((padded - end) * l.units) * 4);
  if constexpr (Mode::kCodes)
    for (int64_t i = end; i < padded; ++i) h.scale[i] = 0, h.start[i] = 0;
}

template <class Mode>
static void pack_values(const Attention& t, const Layout<Mode>& l, const Head& h, int64_t b, int64_t head, int64_t first, int64_t count, const float* scale, const float* mean) {
  const int64_t steps = (count + Mode::kStep - 1) / Mode::kStep;
  uint32_t* block = h.v + first / Mode::kStep * l.channels;
  for (int64_t d = 0; d < t.dim; d += kFloats) {
    const F32 factor = Mode::kCodes ? 1.0f / load<F32>(scale + d) : F32{}, middle = Mode::kCodes ? load<F32>(mean + d) : F32{};
    for (int64_t s = 0; s < steps; ++s) {
      F32 rows[Mode::kStep] = {};
      FASTDIFF_UNROLL for (int r = 0; r < Mode::kStep; ++r) {
        const int64_t i = s * Mode::kStep + r;
        if (i >= count) continue;
        const F32 x = load_some(element(t.v, t.type, b, first + i, head) + d * size_of(t.type), t.dim - d, t.type);
        rows[r] = Mode::kCodes ? (factor < splat(1e38f) ? (x - middle) * factor : F32{}) : x;
      }
      const U32 units = Mode::join(rows);
      for (int64_t c = d; c < d + kFloats && c < l.channels; c += kRows) {
        const int64_t width = l.channels - c < kRows ? l.channels - c : kRows;
        memcpy(block + c * steps + s * width, (const char*)&units + (c - d) * 4, size_t(width) * 4);
      }
    }
  }
}

}  // namespace
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
