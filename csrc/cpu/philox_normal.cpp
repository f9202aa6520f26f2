#include "cpu/philox_normal.h"

#include "cpu/noise.h"
#include "cpu/parallel.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kChunk = 1 << 14;

void philox_normal(float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows,
                   int64_t row_stride, int64_t first, int64_t n) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / chunks, start = task % chunks * kChunk;
      const int64_t count = n - start < kChunk ? n - start : kChunk;
      fill_noise(out + row * row_stride + start, uint64_t(seed[row]), uint32_t(step[row]), uint32_t(stream[row]),
                 first + start, count);
    }
  };
  parallel_for(rows * chunks, rows * n < kChunk, body);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
