#include "cpu/stream_triad.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kChunk = 1 << 14;

void stream_triad(float* out, const float* a, const float* b, int64_t n) {
  auto body = [&](int64_t begin, int64_t end) {
    const int64_t last = end * kChunk < n ? end * kChunk : n;
    for (int64_t i = begin * kChunk; i < last; i += kFloats)
      store_past(out + i, load<F32>(a + i) + 0.5f * load<F32>(b + i));
    _mm_sfence();
  };
  parallel_for((n + kChunk - 1) / kChunk, false, body);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
