// Writes images the way the tiles of a convolution read them: padded with zeros, repeated where they are upsampled, in
// the kind of the weights, channels padded to 4 bytes.
#pragma once
#include "cpu/codes.h"
#include "cpu/conv2d.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace convolution {

// One segment of the input as the tiles see it. Sizes in bytes, but for steps (4 bytes of a pixel each).
struct Plane2d {
  const char* base;
  int64_t pitch, line;        // from pixel to pixel, from row to row
  int64_t height, width;      // padded
  int64_t line_steps, steps;  // of one row of the kernel, of all
};

// The type of the elements that tiles of a kind read, and how a zero is written.
template <class Kind>
struct Stored;
template <>
struct Stored<Floats> {
  static constexpr int kType = kFloat32, kZero = 0;
};
template <>
struct Stored<Brains> {
  static constexpr int kType = kBFloat16, kZero = 0;
};
template <>
struct Stored<Codes> {
  static constexpr int kType = kInt8, kZero = kCodeOffset;
};

// n elements of one type, one after another, as kTo
template <int kTo>
FASTDIFF_ALWAYS void convert_floats(char* to, const char* from, int64_t n, int type) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) store_float(to + i * size_of(kTo), load_float(from + i * size_of(type), type), kTo);
  if (i == n) return;
  alignas(64) char last[kBytes];
  store_float(last, load_first(from + i * size_of(type), type, n - i), kTo);
  memcpy(to + i * size_of(kTo), last, size_t((n - i) * size_of(kTo)));
}

template <class Kind>
static __attribute__((noinline)) void convert(char* to, const char* from, int64_t n, int type, float inverse) {
  constexpr int kTo = Stored<Kind>::kType;
  if constexpr (kTo == kInt8) {
    if (type == kFloat32) return quantize(to, from, kFloat32, n, inverse, kCodeOffset);
    if (type == kBFloat16) return quantize(to, from, kBFloat16, n, inverse, kCodeOffset);
    if (type == kFloat16) return quantize(to, from, kFloat16, n, inverse, kCodeOffset);
    for (int64_t i = 0; i < n; ++i) to[i] = char(from[i] ^ kCodeOffset);
  } else {
    if (type == kTo) {
      memcpy(to, from, size_t(n * size_of(kTo)));
    } else if (type == kFloat32) {
      convert_floats<kTo>(to, from, n, kFloat32);
    } else if (type == kBFloat16) {
      convert_floats<kTo>(to, from, n, kBFloat16);
    } else {
      convert_floats<kTo>(to, from, n, kFloat16);
    }
  }
}

FASTDIFF_ALWAYS int64_t at_most_i(int64_t high, int64_t n) { return n < high ? n : high; }

// Row `row` of a padded sample.
template <class Kind>
static void fill_row(char* to, const Conv2d& c, const Conv2d::Segment& s, const Plane2d& p, int64_t sample, int64_t row,
                     float inverse) {
  const int64_t up = c.upsample, y = row - c.top, used = s.channels * size_of(Stored<Kind>::kType);
  if (y < 0 || y >= c.height * up) {
    memset(to, Stored<Kind>::kZero, size_t(p.line));
    return;
  }
  const int64_t pixel_bytes = s.channels * size_of(s.type), left = at_most_i(p.width, c.left);
  const int64_t wide = at_most_i(p.width - left, c.width * up);
  const char* from = (const char*)s.data + (sample * c.height + y / up) * c.width * pixel_bytes;
  char* first = to + left * p.pitch;
  memset(to, Stored<Kind>::kZero, size_t(left * p.pitch));
  memset(first + wide * p.pitch, Stored<Kind>::kZero, size_t((p.width - left - wide) * p.pitch));
  if (up == 1 && used == p.pitch) return convert<Kind>(first, from, wide * s.channels, s.type, inverse);
  for (int64_t x = 0; x < wide; ++x) {
    char* pixel = first + x * p.pitch;
    if (x % up) {
      memcpy(pixel, pixel - p.pitch, size_t(p.pitch));
      continue;
    }
    convert<Kind>(pixel, from + x / up * pixel_bytes, s.channels, s.type, inverse);
    memset(pixel + used, Stored<Kind>::kZero, size_t(p.pitch - used));
  }
}

constexpr int64_t kSmallFill = 1 << 14;  // bytes that one thread fills sooner than two

// inverse: what the samples are multiplied by, for codes
template <class Kind>
static void fill(const Conv2d& c, const Conv2d::Segment& s, const Plane2d& p, const RowScale* scale) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / p.height;
      fill_row<Kind>((char*)p.base + i * p.line, c, s, p, sample, i % p.height, scale ? scale[sample].inverse : 0.0f);
    }
  };
  parallel_for(c.batch * p.height, c.batch * p.height * p.line < kSmallFill, body);
}

constexpr int kSpread = 16;  // parts of a sample that are searched for its largest magnitude

// Scales [batch] of a segment's codes; `most` [batch, kSpread] is scratch.
static void find_scales(const Conv2d& c, const Conv2d::Segment& s, RowScale* scale, float* most) {
  const int64_t n = c.height * c.width * s.channels;
  if (s.scale) {
    for (int64_t b = 0; b < c.batch; ++b) {
      const float value = s.scale[s.scales == 1 ? 0 : b];
      scale[b] = {value, 1.0f / value};
    }
    return;
  }
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % kSpread, first = n * part / kSpread, last = n * (part + 1) / kSpread;
      most[i] = largest((const char*)s.data + (i / kSpread * n + first) * size_of(s.type), s.type, last - first);
    }
  };
  parallel_for(c.batch * kSpread, c.batch * n < kSmallFill, body);
  for (int64_t b = 0; b < c.batch; ++b)
    scale[b] = row_scale(largest((const char*)(most + b * kSpread), kFloat32, kSpread));
}

}  // namespace convolution
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
