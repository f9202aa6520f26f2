#include "cpu/group_norm.h"

#include "cpu/functions.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

// Statistics are summed over chunks of pixels whose number depends on the shape of a sample only, about one of the
// chunk's own values (the pivot), so that a large mean costs no digits. Chunks are joined in float64.
namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kWorkspace = 6;
constexpr int kQuad = 4;                    // pixels that share one load of their channels' parameters
constexpr int64_t kPanel = 1024;            // channels whose sums are in the first cache
constexpr int64_t kChunk = 1 << 17;         // elements of a chunk
constexpr int64_t kStage = 2 << 20;         // bytes of samples that are normalized while they are still cached

struct Partial {
  float pivot, first, second;  // sums of (x - pivot) and of its square
};

struct Layout {
  int64_t channels, chunks;
  float* parameters;   // [batch, 3, channels]: mean, factor, addend; see finish_parameters
  Partial* partials;   // [batch, chunks, groups]

  float* of(int64_t b) const { return parameters + b * 3 * channels; }
};

FASTDIFF_ALWAYS int64_t group_size(const GroupNorm& t, const Layout& l) { return l.channels / t.groups; }
FASTDIFF_ALWAYS int64_t chunk_begin(const GroupNorm& t, const Layout& l, int64_t chunk) {
  return t.pixels * chunk / l.chunks;
}

static Layout layout(const GroupNorm& t) {
  Layout l{t.x[0].channels + t.x[1].channels, 1, nullptr, nullptr};
  const int64_t size = t.pixels * l.channels;
  if (size >= kSerial) l.chunks = ((size + kChunk - 1) / kChunk + 3) / 4 * 4;
  l.chunks = l.chunks < t.pixels ? l.chunks : t.pixels;
  const int64_t parameters = t.batch * 3 * l.channels, partials = t.batch * l.chunks * t.groups;
  l.parameters = (float*)workspace(kWorkspace, size_t(parameters) * sizeof(float) + size_t(partials) * sizeof(Partial));
  l.partials = (Partial*)(l.parameters + parameters);
  return l;
}

static float single(const GroupNorm& t, int64_t b, int64_t pixel, int64_t channel) {
  const bool second = channel >= t.x[0].channels;
  const GroupNorm::Input& x = t.x[second];
  const int64_t index = (b * t.pixels + pixel) * x.channels + channel - (second ? t.x[0].channels : 0);
  return fetch(element(x.data, index, x.type), x.type, Part{1})[0];
}

// The middle one of three: a value far from the rest would cost its chunk's digits.
static float middle(float a, float b, float c) {
  const float low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c < high ? c : high;
}

// Large images. Four of their rows at once are read with half of the memory's speed (Zen 4), unless what comes next is
// fetched line by line in the order of memory.
static bool is_fetched(const GroupNorm& t, const GroupNorm::Input& x) {
  return t.batch * t.pixels * x.channels * size_of(x.type) >= kPastCaches;
}

// The k-th of the lines that follow those of kQuad vectors.
template <int kType>
FASTDIFF_ALWAYS void fetch_ahead(const char* x, int k, int64_t c) {
  constexpr int64_t kAhead = 4096, kLine = 64;
  if (k * kLine < kQuad * kFloats * size_of(kType)) prefetch(x + kQuad * c * size_of(kType) + k * kLine + kAhead);
}

// Channel sums of a panel, about each channel's pivot.
struct Sums {
  alignas(64) float pivot[kPanel], first[kPanel], second[kPanel];
};

template <int kType, int kCount, bool kFetched = false>
FASTDIFF_ALWAYS void add_pixels(Sums& s, const char* x, int64_t stride, int64_t width) {
  each_vector(width, [&](int64_t c, auto part) {
    const F32 pivot = load<F32>(s.pivot + c);
    F32 d[kCount], e[kCount];
    FASTDIFF_UNROLL
    for (int k = 0; k < kCount; ++k) {
      d[k] = fetch(x + (k * stride + c) * size_of(kType), kType, part) - pivot;
      if (kFetched) fetch_ahead<kType>(x, k, c);
      e[k] = d[k] * d[k];
    }
    FASTDIFF_UNROLL
    for (int half = kCount / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) {
        d[k] = d[k] + d[k + half];
        e[k] = e[k] + e[k + half];
      }
    store(s.first + c, load<F32>(s.first + c) + d[0]);
    store(s.second + c, load<F32>(s.second + c) + e[0]);
  });
}

FASTDIFF_ALWAYS float sum_few(const float* v, int64_t n) {
  float chain[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) chain[k] = chain[k] + v[i + k];
  for (int k = 0; i < n; ++i, ++k) chain[k] = chain[k] + v[i];
  return (chain[0] + chain[1]) + (chain[2] + chain[3]);
}

// Adds to `partials` what `width` channels from `channel` on contribute.
template <int kType>
static void add_panel(const char* x, int64_t stride, int64_t pixels, int64_t channel, int64_t width, int64_t size,
                      Partial* partials, bool fetched) {
  Sums s;
  const int64_t padded = (width + kFloats - 1) / kFloats * kFloats;
  for (int64_t c = 0; c < padded; c += kFloats) {
    store(s.first + c, F32{});
    store(s.second + c, F32{});
  }
  for (int64_t c = 0, g = channel / size; c < width; ++g) {
    const int64_t end = (g + 1) * size - channel < width ? (g + 1) * size - channel : width;
    for (; c < end; ++c) s.pivot[c] = partials[g].pivot;
  }
  for (int64_t c = width; c < padded; ++c) s.pivot[c] = 0.0f;
  int64_t p = 0;
  auto at = [&](int64_t p) { return x + p * stride * size_of(kType); };
  for (; fetched && p + kQuad <= pixels; p += kQuad) add_pixels<kType, kQuad, true>(s, at(p), stride, width);
  for (; p + kQuad <= pixels; p += kQuad) add_pixels<kType, kQuad>(s, at(p), stride, width);
  for (; p < pixels; ++p) add_pixels<kType, 1>(s, at(p), stride, width);
  for (int64_t c = 0, g = channel / size; c < width; ++g) {
    const int64_t end = (g + 1) * size - channel < width ? (g + 1) * size - channel : width;
    partials[g].first = partials[g].first + sum_few(s.first + c, end - c);
    partials[g].second = partials[g].second + sum_few(s.second + c, end - c);
    c = end;
  }
}

static void sum_chunk(const GroupNorm& t, const Layout& l, int64_t b, int64_t chunk) {
  const int64_t begin = chunk_begin(t, l, chunk), count = chunk_begin(t, l, chunk + 1) - begin, size = group_size(t, l);
  Partial* partials = l.partials + (b * l.chunks + chunk) * t.groups;
  for (int64_t g = 0; g < t.groups; ++g) {
    const float ends[] = {single(t, b, begin, g * size), single(t, b, begin + count - 1, g * size)};
    partials[g] = {middle(ends[0], ends[1], single(t, b, begin + count / 2, g * size)), 0.0f, 0.0f};
  }
  for (int64_t s = 0, offset = 0; s < 2; offset += t.x[s++].channels) {
    const GroupNorm::Input& x = t.x[s];
    if (x.channels == 0) continue;
    with_float(x.type, [&](auto type) {
      constexpr int kType = decltype(type)::value;
      const char* start = element(x.data, (b * t.pixels + begin) * x.channels, kType);
      for (int64_t c = 0; c < x.channels; c += kPanel)
        add_panel<kType>(start + c * size_of(kType), x.channels, count, offset + c,
                         x.channels - c < kPanel ? x.channels - c : kPanel, size, partials, is_fetched(t, x));
    });
  }
}

template <class P>
FASTDIFF_ALWAYS F32 value_or(const GroupNorm::Vector& v, int64_t b, int64_t c, float otherwise, P part) {
  return v.data ? fetch(element(v.data, b * v.stride + c, v.type), v.type, part) : F32{} + otherwise;
}

// A group's mean, what its rest is and what it is multiplied by, for each of its channels.
static void set_group(const GroupNorm& t, const Layout& l, int64_t b, int64_t g, Moments m) {
  const int64_t size = group_size(t, l), C = l.channels;
  const float root = inverse_root(m.variance + t.eps);
  float* row = l.of(b) + g * size;
  for (int64_t c = 0; c < size; ++c) {
    row[c] = m.mean;
    row[C + c] = root;
    row[2 * C + c] = m.rest;
  }
}

// Parameters of `count` channels from what set_group has written: y = (x - mean) * factor + addend.
static void finish_parameters(const GroupNorm& t, const Layout& l, int64_t b, int64_t first, int64_t count) {
  const int64_t C = l.channels;
  float* row = l.of(b) + first;
  each_vector(count, [&](int64_t i, auto part) {
    const int64_t c = first + i;
    float *factors = row + C + i, *addends = row + 2 * C + i;
    const F32 one_more = 1.0f + value_or(t.scale, b, c, 0.0f, part);
    const F32 factor = value_or(t.weight, 0, c, 1.0f, part) * fetch(factors, kFloat32, part) * one_more;
    const F32 addend = value_or(t.bias, 0, c, 0.0f, part) * one_more + value_or(t.shift, b, c, 0.0f, part);
    put(addends, addend - fetch(addends, kFloat32, part) * factor, kFloat32, part);
    put(factors, factor, kFloat32, part);
  });
}

static Moments join_chunks(const GroupNorm& t, const Layout& l, int64_t b, int64_t g) {
  const double size = double(group_size(t, l)), n = size * double(t.pixels);
  double sum = 0, squares = 0;
  auto visit = [&](auto add) {
    for (int64_t k = 0; k < l.chunks; ++k) {
      const Partial& p = l.partials[(b * l.chunks + k) * t.groups + g];
      add(p, size * double(chunk_begin(t, l, k + 1) - chunk_begin(t, l, k)));
    }
  };
  visit([&](const Partial& p, double count) { sum += count * double(p.pivot) + double(p.first); });
  const double mean = sum / n;
  // sum of (x - mean)^2, from the sums about the pivot
  visit([&](const Partial& p, double count) {
    const double off = double(p.pivot) - mean;
    squares += double(p.second) + off * (2 * double(p.first) + count * off);
  });
  const double variance = squares / n;
  return {float(mean), float(mean - double(float(mean))), variance < 0 ? 0.0f : float(variance)};
}

static void join_sample(const GroupNorm& t, const Layout& l, int64_t b) {
  for (int64_t g = 0; g < t.groups; ++g) set_group(t, l, b, g, join_chunks(t, l, b, g));
  finish_parameters(t, l, b, 0, l.channels);
}

// What follows the norm, and is the same for all: a loop that knows it keeps its constants in registers.
template <int kOutType, bool kIsActivated>
struct Finish {
  static constexpr int kOut = kOutType;
  static constexpr bool kSilu = kIsActivated;
  float inverse;  // of the scale of int8 results

  explicit Finish(const GroupNorm& t) : inverse(kOut == kInt8 ? 1.0f / *t.out_scale : 1.0f) {}

  template <class V>
  FASTDIFF_ALWAYS V value(const Finish& f, V y) {
    if constexpr (kSilu) y = silu_as<kOut>(y);
    if constexpr (kOut == kInt8) y = y * f.inverse;
    return y;
  }
  template <class P>
  FASTDIFF_ALWAYS void write(void* out, F32 value, bool past, P part) {
    put_either(out, value, kOut, past && kOut != kInt8, part);
  }
};

// Calls f with the Finish of a task.
template <class F>
FASTDIFF_ALWAYS void with_finish(const GroupNorm& t, F f) {
  with_stored(t.out_type, [&](auto out) {
    constexpr int kOut = decltype(out)::value;
    t.silu ? f(Finish<kOut, true>(t)) : f(Finish<kOut, false>(t));
  });
}

// Whether results are stored past the caches: large, and every vector aligned.
static bool is_past(const GroupNorm& t, int64_t elements, int64_t row, int64_t other) {
  const int64_t bytes = size_of(t.out_type);
  return t.out_type != kInt8 && elements * bytes >= kPastCaches && (uintptr_t)t.out % kBytes == 0 &&
         row * bytes % kBytes == 0 && other * bytes % kBytes == 0;
}

template <int kType, int kCount, bool kFetched = false, class F>
FASTDIFF_ALWAYS void apply_pixels(const char* x, int64_t channels, char* out, int64_t stride, const float* row, int64_t C,
                                  const F& finish, bool past) {
  each_vector(channels, [&](int64_t c, auto part) {
    const F32 mean = fetch(row + c, kFloat32, part), factor = fetch(row + C + c, kFloat32, part);
    const F32 addend = fetch(row + 2 * C + c, kFloat32, part);
    Group<kCount> y = group<kCount>([&](int k) __attribute__((always_inline)) {
      if (kFetched) fetch_ahead<kType>(x, k, c);
      return (fetch(x + (k * channels + c) * size_of(kType), kType, part) - mean) * factor + addend;
    });
    y = F::value(finish, y);
    FASTDIFF_UNROLL
    for (int k = 0; k < kCount; ++k) F::write(out + (k * stride + c) * size_of(F::kOut), y.v[k], past, part);
  });
}

template <int kType, class F>
static void apply_input(const GroupNorm& t, const Layout& l, int64_t b, int64_t begin, int64_t end,
                        const GroupNorm::Input& in, int64_t offset, const F& finish) {
  constexpr int kOut = F::kOut;
  const int64_t C = l.channels;
  const bool past = is_past(t, t.batch * t.pixels * C, C, offset) && in.channels % kFloats == 0;
  const bool fetched = is_fetched(t, in);
  const float* row = l.of(b) + offset;
  const char* x = element(in.data, (b * t.pixels + begin) * in.channels, kType);
  char* out = element(t.out, (b * t.pixels + begin) * C + offset, kOut);
  auto from = [&](int64_t p) { return x + p * in.channels * size_of(kType); };
  auto to = [&](int64_t p) { return out + p * C * size_of(kOut); };
  int64_t p = 0;
  for (; fetched && p + kQuad <= end - begin; p += kQuad)
    apply_pixels<kType, kQuad, true>(from(p), in.channels, to(p), C, row, C, finish, past);
  for (; p + kQuad <= end - begin; p += kQuad)
    apply_pixels<kType, kQuad>(from(p), in.channels, to(p), C, row, C, finish, past);
  for (; p < end - begin; ++p) apply_pixels<kType, 1>(from(p), in.channels, to(p), C, row, C, finish, past);
}

static void apply_chunk(const GroupNorm& t, const Layout& l, int64_t b, int64_t chunk) {
  const int64_t begin = chunk_begin(t, l, chunk), end = chunk_begin(t, l, chunk + 1);
  for (int64_t s = 0, offset = 0; s < 2; offset += t.x[s++].channels) {
    if (t.x[s].channels == 0) continue;
    with_float(t.x[s].type, [&](auto in) {
      with_finish(t, [&](auto finish) { apply_input<decltype(in)::value>(t, l, b, begin, end, t.x[s], offset, finish); });
    });
  }
}

// Samples of one chunk, start to end while they are in the nearest caches.
static void run_samples(const GroupNorm& t, const Layout& l, bool serial) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      sum_chunk(t, l, b, 0);
      join_sample(t, l, b);
      apply_chunk(t, l, b, 0);
    }
    _mm_sfence();
  };
  parallel_for(t.batch, serial, body);
}

void group_norm(const GroupNorm& t) {
  const Layout l = layout(t);
  const int64_t sample = t.pixels * l.channels, bytes = sample * size_of(t.x[0].type);
  const int64_t step = bytes < kStage ? kStage / bytes : 1;
  const bool serial = t.batch * sample < kSerial;
  if (l.chunks == 1) return run_samples(t, l, serial);
  for (int64_t first = 0; first < t.batch; first += step) {
    const int64_t count = t.batch - first < step ? t.batch - first : step;
    auto sum = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) sum_chunk(t, l, first + k / l.chunks, k % l.chunks);
    };
    auto join = [&](int64_t begin, int64_t end) {
      for (int64_t b = first + begin; b < first + end; ++b) join_sample(t, l, b);
    };
    // backwards: what was read last is still in the second cache
    auto apply = [&](int64_t begin, int64_t end) {
      for (int64_t k = end - 1; k >= begin; --k) apply_chunk(t, l, first + k / l.chunks, k % l.chunks);
      _mm_sfence();
    };
    parallel_for(count * l.chunks, serial, sum);
    parallel_for(count, serial || count * (l.chunks * t.groups + l.channels) < 1024, join);
    parallel_for(count * l.chunks, serial, apply);
  }
}

template <int kType, class F>
static void run_group(const GroupNorm& t, const Layout& l, int64_t b, int64_t g, const F& finish) {
  const int64_t size = group_size(t, l), C = l.channels, begin = (b * C + g * size) * t.pixels;
  set_group(t, l, b, g, moments<kType>(element(t.x[0].data, begin, kType), size * t.pixels));
  finish_parameters(t, l, b, g * size, size);
  const bool past = is_past(t, t.batch * C * t.pixels, t.pixels, 0) && t.pixels % kFloats == 0;
  for (int64_t i = 0; i < size; ++i) {
    const float* row = l.of(b) + g * size + i;
    const char* x = element(t.x[0].data, begin + i * t.pixels, kType);
    char* out = element(t.out, begin + i * t.pixels, F::kOut);
    auto at = [&](int64_t p, auto part) __attribute__((always_inline)) {
      return (fetch(x + p * size_of(kType), kType, part) - row[0]) * row[C] + row[2 * C];
    };
    int64_t p = 0;
    for (; p + kGroup * kFloats <= t.pixels; p += kGroup * kFloats) {
      const Group<kGroup> y =
          group<kGroup>([&](int k) __attribute__((always_inline)) { return at(p + k * kFloats, Whole()); });
      const Group<kGroup> z = F::value(finish, y);
      FASTDIFF_UNROLL
      for (int k = 0; k < kGroup; ++k)
        F::write(out + (p + k * kFloats) * size_of(F::kOut), z.v[k], past, Whole());
    }
    each_vector(t.pixels - p, [&](int64_t i, auto part) {
      F::write(out + (p + i) * size_of(F::kOut), F::value(finish, at(p + i, part)), past, part);
    });
  }
}

void group_norm_nchw(const GroupNorm& t) {
  const Layout l = layout(t);
  with_float(t.x[0].type, [&](auto in) {
    with_finish(t, [&](auto finish) {
      auto body = [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k)
          run_group<decltype(in)::value>(t, l, k / t.groups, k % t.groups, finish);
        _mm_sfence();
      };
      parallel_for(t.batch * t.groups, t.batch * l.channels * t.pixels < kSerial, body);
    });
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
