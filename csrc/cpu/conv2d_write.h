// What happens to the sums of a tile of pixels. In float32 and in this order: y = sum * scale of the sample * scale of the
// column, for codes; + that of the segment before; + bias; + emb; + residual; cast, or int8 codes of y / out_scale.
#pragma once
#include "cpu/conv2d_tile.h"
#include "cpu/epilogue_tile.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace convolution {

// What integer sums are multiplied by: one of each sample, one of each column of the group.
struct Scales {
  const RowScale* sample;
  const float* column;
};

FASTDIFF_ALWAYS F32 scaled(const float* sum, const Scales& s, const Pixel& pixel, int column) {
  return load<F32>(sum) * s.sample[pixel.sample].scale * load<F32>(s.column + column);
}

// The part that the first of two segments has in the result; ld numbers from pixel to pixel.
static void scale_sums(const Scales& s, const Tile& t, const float* sums, float* out, int ld) {
  for (int n = 0; n < ld; n += kFloats)
    for (int i = 0; i < t.count; ++i) store(out + i * ld + n, scaled(sums + i * ld + n, s, t.pixel[i], n));
}

FASTDIFF_ALWAYS void fetch_line(const char* at) { _mm_prefetch(at, _MM_HINT_T0); }

// Where the results of a tile's pixels go, and what is added to them; null means absent.
struct Places {
  char* out[kMostRows];
  const char* residual[kMostRows];
  const float* emb[kMostRows];
};

FASTDIFF_ALWAYS void find_places(Places& p, const Conv2d& c, const Tile& t) {
  for (int i = 0; i < t.count; ++i) {
    const Pixel& at = t.pixel[i];
    const int64_t first = ((at.sample * c.out_height + at.y) * c.out_width + at.x) * c.outputs;
    p.out[i] = (char*)c.out + first * size_of(c.out_type);
    p.residual[i] = (const char*)c.residual + first * size_of(c.residual_type);
    p.emb[i] = c.emb + at.sample * c.emb_stride;
  }
}

// Starts to bring in what write_pixels will touch, so that memory works while the products are added up: with 32 to 32
// channels at 16 x 32^2 a tenth of the time.
static void fetch_places(const Conv2d& c, const Tile& t, int64_t first_panel, int panels) {
  Places p;
  find_places(p, c, t);
  const int64_t first = first_panel * kPanel, count = at_most_i(panels * kPanel, c.outputs - first);
  for (int i = 0; i < t.count; ++i) {
    for (int64_t n = 0; n < count * size_of(c.out_type); n += 64) fetch_line(p.out[i] + first * size_of(c.out_type) + n);
    for (int64_t n = 0; c.residual && n < count * size_of(c.residual_type); n += 64)
      fetch_line(p.residual[i] + first * size_of(c.residual_type) + n);
  }
}

constexpr int kNone = -1, kAny = -2;  // in place of the type of the residual

// kFloats columns from `column` of the sums and `first` of the results on; n of them are there.
template <bool kCodes, int kOut, int kResidual, bool kEmb>
FASTDIFF_ALWAYS void write_columns(const Conv2d& c, const Scales& s, const Tile& t, const Places& p, const float* sums,
                                   const float* before, int ld, int column, int64_t first, int64_t n, float inverse) {
  const F32 bias = c.bias ? load_some(c.bias, first, n) : F32{};
  for (int i = 0; i < t.count; ++i) {
    const float* sum = sums + i * ld + column;
    F32 y = kCodes ? scaled(sum, s, t.pixel[i], column) : load<F32>(sum);
    if (before) y = load<F32>(before + i * ld + column) + y;
    y = y + bias;
    if (kEmb && c.emb) y = y + load_some(p.emb[i], first, n);
    if (kResidual == kAny && c.residual) y = y + load_some(p.residual[i], first, c.residual_type, n);
    if (kResidual >= 0) y = y + load_float(p.residual[i] + first * size_of(kResidual), kResidual);
    store_some<kOut>(p.out[i] + first * size_of(kOut), y, n, inverse);
  }
}

// The same where all columns are there: the loop knows what is added.
template <bool kCodes, int kOut, bool kEmb>
FASTDIFF_ALWAYS void write_whole(const Conv2d& c, const Scales& s, const Tile& t, const Places& p, const float* sums,
                                 const float* before, int ld, int column, int64_t first, float inverse) {
  constexpr int kSame = kOut == kInt8 ? kAny : kOut;
  if (c.residual == nullptr) return write_columns<kCodes, kOut, kNone, kEmb>(c, s, t, p, sums, before, ld, column, first, kFloats, inverse);
  if (c.residual_type == kSame) return write_columns<kCodes, kOut, kSame, kEmb>(c, s, t, p, sums, before, ld, column, first, kFloats, inverse);
  write_columns<kCodes, kOut, kAny, kEmb>(c, s, t, p, sums, before, ld, column, first, kFloats, inverse);
}

// The sums [pixels, 16 * panels] of a tile and `panels` panels from first_panel on.
template <bool kCodes, int kOut>
static __attribute__((noinline)) void write_pixels(const Conv2d& c, const Scales& s, const Tile& t, const float* sums,
                                                   const float* before, int64_t first_panel, int panels) {
  const int ld = panels * kPanel;
  const float inverse = c.out_scale ? 1.0f / *c.out_scale : 1.0f;
  Places p;
  find_places(p, c, t);
  for (int n = 0; n < ld; n += kFloats) {
    const int64_t first = first_panel * kPanel + n, left = c.outputs - first;
    if (left <= 0) return;
    if (left < kFloats) {
      write_columns<kCodes, kOut, kAny, true>(c, s, t, p, sums, before, ld, n, first, left, inverse);
    } else if (c.emb) {
      write_whole<kCodes, kOut, true>(c, s, t, p, sums, before, ld, n, first, inverse);
    } else {
      write_whole<kCodes, kOut, false>(c, s, t, p, sums, before, ld, n, first, inverse);
    }
  }
}

using WritePixels = void(const Conv2d& c, const Scales& s, const Tile& t, const float* sums, const float* before,
                         int64_t first_panel, int panels);

template <bool kCodes>
FASTDIFF_ALWAYS WritePixels* pixel_writer(int type) {
  if (type == kInt8) return write_pixels<kCodes, kInt8>;
  if (type == kBFloat16) return write_pixels<kCodes, kBFloat16>;
  return type == kFloat16 ? write_pixels<kCodes, kFloat16> : write_pixels<kCodes, kFloat32>;
}

}  // namespace convolution
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
