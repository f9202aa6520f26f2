#include "cpu/quantize_rows.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

template <int kType>
FASTDIFF_ALWAYS float quantize_row(int8_t* codes, const void* x, int64_t n, const void* next) {
  I32 most[Lanes64::kVectors] = {};
  each_lane(n, [&](int k, int64_t i, auto part) {
    most[k] = larger(most[k], magnitude(fetch(element(x, i, kType), kType, part)));
  });
  for (int k = 1; k < Lanes64::kVectors; ++k) most[0] = larger(most[0], most[k]);
  const CodeScale s = code_scale(largest(most[0]));
  each_vector(n, [&](int64_t i, auto part) {
    prefetch(element(next, i, kType));
    put(codes + i, fetch(element(x, i, kType), kType, part) * s.inverse, kInt8, part);
  });
  return s.scale;
}

void quantize_rows(int8_t* codes, float* scales, const void* x, int type, int64_t rows, int64_t n, int64_t stride) {
  with_float(type, [&](auto in) {
    constexpr int kType = decltype(in)::value;
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        scales[r] = quantize_row<kType>(codes + r * n, element(x, r * stride, kType), n, element(x, (r + 1) * stride, kType));
    };
    parallel_for(rows, rows * n < kSerial, body);
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
