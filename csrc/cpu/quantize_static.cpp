#include "cpu/quantize_static.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kSerialCodes = 1 << 15;  // elements that one thread converts in the time two need to start

// Nearest even for magnitudes below 2^22; larger ones stay beyond every code, and NaN stays NaN.
FASTDIFF_ALWAYS F32 rounded(F32 v) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  return (v + magic) - magic;
}

template <int kType>
FASTDIFF_ALWAYS void row_codes(const StaticCodes& a, int64_t r) {
  int8_t* codes = a.codes + r * (a.n + a.tail);
  const char* x = element(a.x, r * a.stride, kType);
  const float inverse = 1.0f / a.scale[r / a.share], offset = a.offset ? a.offset[r / a.share] : 0.0f;
  each_vector(a.n, [&](int64_t i, auto part) {
    put(codes + i, rounded(fetch(element(x, i, kType), kType, part) * inverse) + offset, kInt8, part);
  });
  for (int64_t i = a.n; i < a.n + a.tail; ++i) codes[i] = int8_t(-offset);
}

void quantize_static(const StaticCodes& a) {
  with_float(a.type, [&](auto in) {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) row_codes<decltype(in)::value>(a, r);
    };
    parallel_for(a.rows, a.rows * a.n < kSerialCodes, body);
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
