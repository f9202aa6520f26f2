#include "cpu/attention.h"

#include "cpu/attention_mask.h"
#include "cpu/attention_pack.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

// softmax(q k^T * scale + mask) v, in one pass over the keys with a running maximum (Dao et al. 2022, algorithm 1). Keys are
// taken in blocks of 128 in order, by one thread: a row's bits depend on that row, its keys and its values only.
namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int kVectors = 2;                         // of queries in a tile: 16 sums of 8 keys fill half the registers
constexpr int64_t kPacked = int64_t(8) << 20;       // bytes of keys and values that lie ready at a time
constexpr int64_t kNear = int64_t(1) << 19;         // bytes of keys and values that leave room in the second cache
constexpr int64_t kSerial = int64_t(1) << 17;       // multiplications below which a second thread costs more than it saves

template <class Mode>
struct Plan {
  const Attention& t;
  Layout<Mode> layout;
  uint32_t* packed;
  bool by_tile;  // the order of the tasks

  int64_t length(int64_t b) const {
    if (t.lengths == nullptr) return t.keys;
    return t.lengths[b] < 0 ? 0 : t.lengths[b] < t.keys ? t.lengths[b] : t.keys;
  }
};

// The number of keys in a block of one sample; not positive past its last.
template <class Mode>
int64_t keys_of(const Plan<Mode>& p, int64_t b, int64_t block) {
  const int64_t left = p.length(b) - block * kKeys;
  return left < kKeys ? left : kKeys;
}

template <class Mode>
void measure_task(const Plan<Mode>& p, int64_t first, int64_t task) {
  const Attention& t = p.t;
  const int64_t slot = task / p.layout.blocks, block = task % p.layout.blocks;
  const int64_t b = (first + slot) / t.key_heads, head = (first + slot) % t.key_heads, count = keys_of(p, b, block);
  float* out = p.layout.head(p.packed, slot).partial + block * 4 * p.layout.padded_dim;
  if (count > 0) measure_block(t, b, head, block * kKeys, count, p.layout.padded_dim, out);
}

template <class Mode>
void pack_task(const Plan<Mode>& p, int64_t first, int64_t task) {
  const Attention& t = p.t;
  const int64_t slot = task / p.layout.blocks, block = task % p.layout.blocks;
  const int64_t b = (first + slot) / t.key_heads, head = (first + slot) % t.key_heads, count = keys_of(p, b, block);
  if (count <= 0) return;
  const Head h = p.layout.head(p.packed, slot);
  alignas(64) float mean[Mode::kCodes ? kMostDim : 1], scale[Mode::kCodes ? kMostDim : 1], value_mean[Mode::kCodes ? kMostDim : 1];
  if constexpr (Mode::kCodes) {
    const int64_t padded = p.layout.padded_dim;
    join_blocks(h.partial, p.length(b), t.dim, padded, mean, scale, value_mean);
    if (block == 0) {
      memcpy(h.mean, mean, size_t(padded) * 4);
      memcpy(h.value_scale, scale, size_t(padded) * 4);
      memcpy(h.value_mean, value_mean, size_t(padded) * 4);
    }
  }
  pack_keys(t, p.layout, h, b, head, block * kKeys, count, Mode::kCodes ? mean : nullptr);
  pack_values(t, p.layout, h, b, head, block * kKeys, count, scale, value_mean);
}

// log(sum of exp(scores)) of the tile's queries; the mean that codes of keys lack is put back.
template <class Mode, int NV>
void write_lse(const Attention& t, const Head& h, int64_t b, int64_t head, int64_t q0, const F32 (&top)[NV], const F32 (&total)[NV]) {
  const float one = Mode::kCodes ? exponential<Mode::kExact>(splat(kLog2Of255))[0] : 1.0f;
  for (int i = 0; i < NV * kFloats && q0 + i < t.queries; ++i) {
    const float sum = total[i / kFloats][i % kFloats] / one;
    float value = (top[i / kFloats][i % kFloats] + log2_of(sum)) * 0.693147181f;
    if (Mode::kCodes && sum != 0) {
      const char* q = element(t.q, t.type, b, q0 + i, head);
      F32 dot = {};
      for (int64_t d = 0; d < t.dim; d += kFloats)
        dot = dot + load_some(q + d * size_of(t.type), t.dim - d, t.type) * load<F32>(h.mean + d);
      value += t.scale * sum_of(dot);
    }
    t.lse[(b * t.heads + head) * t.queries + q0 + i] = value;
  }
}

template <class Mode, int NV>
void run_tile(const Plan<Mode>& p, int64_t b, int64_t head, int64_t slot, int64_t q0, const Scratch& s) {
  const Attention& t = p.t;
  const Head h = p.layout.head(p.packed, slot);
  const int64_t units = p.layout.units, channels = p.layout.channels, length = p.length(b);
  F32 factor[NV], top[NV], total[NV];
  {
    alignas(64) float scale[NV * kFloats];
    pack_queries<Mode, NV>(t, p.layout, b, head, q0, s.q, scale);
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) factor[j] = load<F32>(scale + j * kFloats);
  }
  FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) total[j] = F32{}, top[j] = splat(-__builtin_inff());
  memset(s.out, 0, size_t(channels * NV * kFloats) * sizeof(float));
  for (int64_t first = 0; first < length; first += kKeys) {
    const int64_t count = length - first < kKeys ? length - first : kKeys;
    F32 most[NV], shrink[NV], base[NV], unit[NV];
    score_block<Mode, NV>(s.scores, h, units, s.q, first, count, most);
    if (t.mask_type != kNoMask) mask_block<NV>(t, b, head, q0, first, count, s.scores, factor, most);
    FASTDIFF_UNROLL for (int j = 0; j < NV; ++j) {
      unit[j] = t.mask_type != kNoMask ? splat(1.0f) : factor[j];
      const F32 old = top[j];
      top[j] = largest(old, most[j] * unit[j]);
      // a query without a key so far: 2^(-infinity - 0) is 0
      base[j] = top[j] == -__builtin_inff() ? F32{} : top[j];
      shrink[j] = exponential<true>(old - base[j]);
      total[j] = total[j] * shrink[j];
    }
    weigh<Mode, NV>(s.scores, count, unit, base, total);
    mix_block<Mode, NV>(s.out, h.v + first / Mode::kStep * channels, (const uint32_t*)s.scores, channels, count, shrink);
  }
  finish<Mode, NV>(t, h, b, head, q0, s.out, total);
  if (t.lse) write_lse<Mode, NV>(t, h, b, head, q0, top, total);
}

// Starts to bring queries, and the memory of their results, into the second cache: with few keys it is waited for
// otherwise (Zen 4, 4096 queries of dimension 40, 77 keys: 50 -> 59 % of peak in float32, 60 -> 68 % in bfloat16).
// Inlined: a call that has no effect but this is left out.
FASTDIFF_ALWAYS void fetch_queries(const Attention& t, int64_t b, int64_t head, int64_t first, int64_t count) {
  const int64_t size = size_of(t.type), bytes = t.dim * size;
  const auto fetch = [&](const char* row, int64_t next) __attribute__((always_inline)) {
    for (int64_t i = first; i < first + count && i < t.queries; ++i, row += next)
      for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
  };
  fetch(element(t.q, t.type, b, first, head), t.q.token * size);
  fetch((const char*)t.out + ((b * t.queries + first) * t.heads + head) * bytes, t.heads * bytes);
}

// Tiles [begin, end) of a group of heads: all tiles of a head, then the next head; or, where the keys and values of a sample
// stay in the second cache, all heads of a tile, so that whole rows of queries and results are in it.
template <class Mode>
void run_tiles(const Plan<Mode>& p, int64_t first_head, int64_t begin, int64_t end) {
  const Attention& t = p.t;
  constexpr int64_t wide = kVectors * kFloats;
  const bool fetches = p.by_tile && t.queries * t.heads * t.dim * size_of(t.type) > kNear;
  const int64_t tiles = (t.queries + wide - 1) / wide, share = t.heads / t.key_heads;
  const int64_t heads = p.by_tile ? t.heads : 1, per_turn = tiles * heads;
  const auto room = [](int64_t vectors) { return size_t(vectors) * wide * sizeof(float); };
  const Scratch s{(uint32_t*)__builtin_alloca_with_align(room(p.layout.units), 512),
                  (float*)__builtin_alloca_with_align(room(kKeys), 512),
                  (float*)__builtin_alloca_with_align(room(p.layout.channels), 512)};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t q0 = task % per_turn / heads * wide, query_head = task / per_turn * heads + task % heads;
    const int64_t slot = query_head / share, b = (first_head + slot) / t.key_heads;
    const int64_t head = (first_head + slot) % t.key_heads * share + query_head % share;
    if (fetches) fetch_queries(t, b, head, q0 + wide, wide);
    if (t.queries - q0 <= kFloats) {
      run_tile<Mode, 1>(p, b, head, slot, q0, s);
    } else {
      run_tile<Mode, kVectors>(p, b, head, slot, q0, s);
    }
  }
}

template <class Mode>
void run(const Attention& t) {
  const Layout<Mode> layout(t);
  const int64_t heads = t.batch * t.key_heads, bytes = layout.words() * 4;
  const bool by_tile = t.key_heads * bytes <= kNear;
  int64_t group = kPacked / (bytes ? bytes : 1);
  if (by_tile) group -= group % (t.key_heads ? t.key_heads : 1);
  group = group < 1 ? 1 : group < heads ? group : heads;
  const Plan<Mode> p{t, layout, (uint32_t*)workspace(4, size_t(group * bytes + 64)), by_tile};
  const int64_t tiles = (t.queries + kVectors * kFloats - 1) / (kVectors * kFloats) * (t.heads / t.key_heads);
  for (int64_t first = 0; first < heads; first += group) {
    const int64_t count = heads - first < group ? heads - first : group;
    const bool small = count * t.keys * t.dim < kSerial / 16;
    auto measure = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) measure_task(p, first, task);
    };
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) pack_task(p, first, task);
    };
    auto tile = [&](int64_t begin, int64_t end) { run_tiles(p, first, begin, end); };
    if (Mode::kCodes) parallel_for(count * layout.blocks, small, measure);
    parallel_for(count * layout.blocks, small, pack);
    parallel_for(count * tiles, count * tiles * kVectors * kFloats * t.keys * t.dim < kSerial, tile);
  }
}

}  // namespace

void attention(const Attention& t) {
  if (t.precision == kAttentionFloat) return run<FloatMode>(t);
  if (t.precision == kAttentionBrain) return run<BrainMode>(t);
  run<CodeMode>(t);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
