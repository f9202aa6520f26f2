#include "cpu/depthwise_conv2d.h"

#include "cpu/functions.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kChannels = 128;  // of one task: three rows of a feature map stay in L2
constexpr int64_t kSpan = 64;       // columns whose values wait for their gates

struct Column {
  F32 row[3];
};

// Where the three rows around row y begin, null above and below the image.
struct Rows3 {
  const char* at[3];
};

template <int kType, class P>
FASTDIFF_ALWAYS Column fetch_column(const Rows3& rows, int64_t offset, bool exists, P part) {
  Column column;
  for (int r = 0; r < 3; ++r)
    column.row[r] = exists && rows.at[r] ? fetch(element(rows.at[r], offset, kType), kType, part) : F32{};
  return column;
}

// emit(x, sum) for columns [begin, end) of the channels from c on
template <int kType, class P, class F>
FASTDIFF_ALWAYS void convolve(const DepthwiseConv2d& t, const Rows3& rows, int64_t c, int64_t begin, int64_t end, P part,
                              F emit) {
  F32 weight[9];
  for (int k = 0; k < 9; ++k) weight[k] = fetch(t.weight + k * t.channels + c, kFloat32, part);
  const F32 bias = t.bias ? fetch(t.bias + c, kFloat32, part) : F32{};
  auto column = [&](int64_t x) { return fetch_column<kType>(rows, x * t.channels + c, x >= 0 && x < t.width, part); };
  Column left = column(begin - 1), middle = column(begin);
  for (int64_t x = begin; x < end; ++x) {
    const Column right = column(x + 1);
    F32 sum = bias;
    for (int r = 0; r < 3; ++r) {
      sum = fused(left.row[r], weight[3 * r], sum);
      sum = fused(middle.row[r], weight[3 * r + 1], sum);
      sum = fused(right.row[r], weight[3 * r + 2], sum);
    }
    emit(x, sum);
    left = middle;
    middle = right;
  }
}

// Channels [first, first + n) of row y of sample b.
template <int kType, int kOut, bool kGated>
static void run_row(const DepthwiseConv2d& t, int64_t b, int64_t y, int64_t first, int64_t n) {
  const int64_t channels = kGated ? t.channels / 2 : t.channels;
  Rows3 rows;
  for (int r = 0; r < 3; ++r) {
    const int64_t at = y + r - 1;
    rows.at[r] = at < 0 || at >= t.height ? nullptr : element(t.x, (b * t.height + at) * t.width * t.channels, kType);
  }
  char* out = element(t.out, (b * t.height + y) * t.width * channels, kOut);
  alignas(64) float values[kSpan * kFloats];
  for (int64_t begin = 0; begin < t.width; begin += kSpan) {
    const int64_t end = begin + kSpan < t.width ? begin + kSpan : t.width;
    each_vector(n, [&](int64_t i, auto part) {
      const int64_t c = first + i;
      auto result = [&](int64_t x, F32 value) { put_result(element(out, x * channels + c, kOut), value, kOut, part); };
      if (!kGated) return convolve<kType>(t, rows, c, begin, end, part, result);
      float* const waiting = values - begin * kFloats;
      convolve<kType>(t, rows, c, begin, end, part, [&](int64_t x, F32 value) { store(waiting + x * kFloats, value); });
      convolve<kType>(t, rows, channels + c, begin, end, part, [&](int64_t x, F32 gate) {
        result(x, load<F32>(waiting + x * kFloats) * silu(gate));
      });
    });
  }
}

template <int kType, int kOut, bool kGated>
FASTDIFF_ALWAYS void run(const DepthwiseConv2d& t) {
  const int64_t channels = kGated ? t.channels / 2 : t.channels, chunks = (channels + kChannels - 1) / kChannels;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t y = task % t.height, chunk = task / t.height % chunks, b = task / t.height / chunks;
      const int64_t first = chunk * kChannels, left = channels - first;
      run_row<kType, kOut, kGated>(t, b, y, first, left < kChannels ? left : kChannels);
    }
  };
  parallel_for(t.batch * chunks * t.height, t.batch * t.height * t.width * t.channels < kSerial / 4, body);
}

void depthwise_conv2d(const DepthwiseConv2d& t) {
  with_float(t.type, [&](auto in) {
    with_float(t.out_type, [&](auto out) {
      constexpr int kType = decltype(in)::value, kOut = decltype(out)::value;
      t.gated ? run<kType, kOut, true>(t) : run<kType, kOut, false>(t);
    });
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
