#include "cpu/resample.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

// Each of `count` pixels of one row, twice in both rows of the result. 16-bit types go as bfloat16, which changes no bit
// of a number.
template <int kType>
static void repeat_row(const char* x, char* out, int64_t count, int64_t channels) {
  constexpr int kMoved = kType == kFloat32 ? kFloat32 : kBFloat16;
  const int64_t pixel = channels * size_of(kType), row = 2 * count * pixel;
  for (int64_t p = 0; p < count; ++p, x += pixel, out += 2 * pixel)
    each_vector(channels, [&](int64_t c, auto part) {
      const int64_t at = c * size_of(kType);
      const F32 value = fetch(x + at, kMoved, part);
      put(out + at, value, kMoved, part);
      put(out + pixel + at, value, kMoved, part);
      put(out + row + at, value, kMoved, part);
      put(out + row + pixel + at, value, kMoved, part);
    });
}

template <int kType>
static void average_row(const char* x, char* out, int64_t count, int64_t width, int64_t channels) {
  const int64_t pixel = channels * size_of(kType), row = width * pixel;
  for (int64_t p = 0; p < count; ++p, x += 2 * pixel, out += pixel)
    each_vector(channels, [&](int64_t c, auto part) {
      const char* at = x + c * size_of(kType);
      const F32 top = fetch(at, kType, part) + fetch(at + pixel, kType, part);
      const F32 bottom = fetch(at + row, kType, part) + fetch(at + row + pixel, kType, part);
      put(out + c * size_of(kType), (top + bottom) * 0.25f, kType, part);
    });
}

void resample(const Resample& t) {
  with_float(t.type, [&](auto type) {
    constexpr int kType = decltype(type)::value;
    const int64_t rows = t.average ? t.height / 2 : t.height, columns = t.average ? t.width / 2 : t.width;
    const int64_t line = t.width * t.channels, result = columns * t.channels;
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t b = k / rows, y = k % rows;
        if (t.average) {
          average_row<kType>(element(t.x, (b * t.height + 2 * y) * line, kType), element(t.out, k * result, kType), columns,
                             t.width, t.channels);
        } else {
          repeat_row<kType>(element(t.x, k * line, kType), element(t.out, 4 * k * line, kType), columns, t.channels);
        }
      }
    };
    parallel_for(t.batch * rows, t.batch * t.height * line < kSerial / 2, body);
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
