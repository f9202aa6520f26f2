#include "cpu/scale_channels.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kSerialProducts = 1 << 15;  // elements that one thread multiplies in the time two need to start

void scale_channels(void* out, int out_type, const void* x, int type, int64_t rows, int64_t n, int64_t stride,
                    const float* factor) {
  with_float(type, [&](auto in) {
    with_float(out_type, [&](auto to) {
      constexpr int kIn = decltype(in)::value, kOut = decltype(to)::value;
      auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          each_vector(n, [&](int64_t i, auto part) {
            const F32 v = fetch(element(x, r * stride + i, kIn), kIn, part) * fetch(factor + i, kFloat32, part);
            put(element(out, r * n + i, kOut), v, kOut, part);
          });
      };
      parallel_for(rows, rows * n < kSerialProducts, body);
    });
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
