// Convolutions to a few channels, such as the last of a network: a vector of input channels meets each output's weights,
// where a tile would compute 16 outputs. The image is read as it is, and only where the kernel lies on it.
#pragma once
#include "cpu/conv2d_write.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace convolution {

constexpr int kFewOutputs = 4;

static bool is_narrow(const Conv2d& c) {
  return c.weight_type == kFloat32 && c.outputs <= kFewOutputs && c.segments == 1 && c.upsample == 1 &&
         c.segment[0].channels >= kFloats && c.out_type != kInt8;
}

// Weights [outputs][kernel row][kernel column][channel] of the only panel.
static const float* unpack_few(const Conv2d& c) {
  const int64_t k = c.kernel * c.kernel * c.segment[0].channels;
  float* out = (float*)workspace(2, size_t(k * c.outputs) * sizeof(float));
  for (int64_t i = 0; i < k; ++i)
    for (int64_t n = 0; n < c.outputs; ++n) out[n * k + i] = ((const float*)c.weight)[i * kPanel + n];
  return out;
}

constexpr int kTogether = 4;  // pixels of a row that share the loads of the weights

// The taps of a kernel [first, last) that lie on a line of `size` pixels, from pixel `start` on.
struct Reach {
  int64_t first, last;
};
FASTDIFF_ALWAYS Reach reach(int64_t start, int64_t kernel, int64_t size) {
  return {start < 0 ? -start : 0, at_most_i(kernel, size - start)};
}

// sums [P, kPanel] of P pixels beside one another, the same columns of the kernel of each on the image. Vectors of
// channels are added up first, then their lanes.
template <int kType, int N, int P>
static void sum_few_outputs(const Conv2d& c, const float* weight, const Pixel& at, float* sums) {
  const Conv2d::Segment& s = c.segment[0];
  const int64_t y0 = at.y * c.stride - c.top, x0 = at.x * c.stride - c.left;
  const Reach rows = reach(y0, c.kernel, c.height), columns = reach(x0, c.kernel, c.width);
  const int64_t of_row = c.kernel * s.channels, of_output = c.kernel * of_row, next = c.stride * s.channels;
  F32 sum[P][N] = {};
  for (int64_t ky = rows.first; ky < rows.last; ++ky) {
    const char* x = element(s.data, ((at.sample * c.height + y0 + ky) * c.width + x0 + columns.first) * s.channels, kType);
    const float* w = weight + ky * of_row + columns.first * s.channels;
    each_vector((columns.last - columns.first) * s.channels, [&](int64_t i, auto part) {
      F32 right[N];
      FASTDIFF_UNROLL
      for (int n = 0; n < N; ++n) right[n] = fetch(w + n * of_output + i, kFloat32, part);
      FASTDIFF_UNROLL
      for (int p = 0; p < P; ++p) {
        const F32 left = fetch(x + (p * next + i) * size_of(kType), kType, part);
        FASTDIFF_UNROLL
        for (int n = 0; n < N; ++n) sum[p][n] = multiply_add(left, right[n], sum[p][n]);
      }
    });
  }
  FASTDIFF_UNROLL
  for (int p = 0; p < P; ++p) {
    FASTDIFF_UNROLL
    for (int n = 0; n < N; ++n) sums[p * kPanel + n] = join_lanes(sum[p][n]);
  }
}

template <int kType, int N>
static void run_few(const Conv2d& c) {
  const float* weight = unpack_few(c);
  WritePixels* const write = pixel_writer<false>(c.out_type);
  auto body = [&](int64_t begin, int64_t end) {
    Tile t;
    alignas(64) float sums[kTogether * kPanel] = {};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / c.out_height, y = row % c.out_height;
      for (int64_t x = 0; x < c.out_width; x += t.count) {
        const int64_t x0 = x * c.stride - c.left, last = x0 + (kTogether - 1) * c.stride + c.kernel;
        t.count = x0 >= 0 && last <= c.width && x + kTogether <= c.out_width ? kTogether : 1;
        for (int i = 0; i < t.count; ++i) t.pixel[i] = {sample, y, x + i};
        if (t.count == 1) {
          sum_few_outputs<kType, N, 1>(c, weight, t.pixel[0], sums);
        } else {
          sum_few_outputs<kType, N, kTogether>(c, weight, t.pixel[0], sums);
        }
        write(c, {nullptr, nullptr}, t, sums, nullptr, 0, 1);
      }
    }
  };
  const int64_t rows = c.batch * c.out_height, products = rows * c.out_width * c.kernel * c.kernel * c.segment[0].channels;
  parallel_for(rows, products < kSerial, body);
}

template <int N = kFewOutputs>
static void run_narrow(const Conv2d& c) {
  if constexpr (N > 1) {
    if (c.outputs < N) return run_narrow<N - 1>(c);
  }
  with_float(c.segment[0].type, [&](auto type) { run_few<decltype(type)::value, N>(c); });
}

}  // namespace convolution
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
