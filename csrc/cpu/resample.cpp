#include "cpu/resample.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kAhead = 2 << 10;  // bytes that are fetched ahead

// Each of `count` pixels of one row, twice in both rows of the result.
static void repeat_row(const char* x, char* out, int64_t count, int64_t pixel, bool past) {
  const int64_t row = 2 * count * pixel;
  for (int64_t p = 0; p < count; ++p, x += pixel, out += 2 * pixel) {
    char* const to[] = {out, out + pixel, out + row, out + row + pixel};
    int64_t i = 0;
    for (; i + kBytes <= pixel; i += kBytes) {
      const F32 bits = load<F32>(x + i);
      for (char* each : to) past ? store_past((float*)(each + i), bits) : store(each + i, bits);
    }
    if (i == pixel) continue;
    for (char* each : to) memcpy(each + i, x + i, size_t(pixel - i));
  }
}

template <int kType>
static void average_row(const char* x, char* out, int64_t count, int64_t width, int64_t channels, bool past) {
  const int64_t pixel = channels * size_of(kType), row = width * pixel, lines[] = {0, 64, row, row + 64};
  for (int64_t p = 0; p < count; ++p, x += 2 * pixel, out += pixel)
    each_vector(channels, [&](int64_t c, auto part) {
      const char *at = x + c * size_of(kType), *ahead = x + 2 * c * size_of(kType) + kAhead;
      // in the order of memory, which reading two pixels at once is not
      for (const int64_t line : lines) prefetch(ahead + line);
      const F32 top = fetch(at, kType, part) + fetch(at + pixel, kType, part);
      const F32 bottom = fetch(at + row, kType, part) + fetch(at + row + pixel, kType, part);
      put_either(out + c * size_of(kType), (top + bottom) * 0.25f, kType, past, part);
    });
}

void resample(const Resample& t) {
  with_float(t.type, [&](auto type) {
    constexpr int kType = decltype(type)::value;
    const int64_t rows = t.average ? t.height / 2 : t.height, columns = t.average ? t.width / 2 : t.width;
    const int64_t line = t.width * t.channels, result = columns * t.channels, bytes = t.channels * size_of(kType);
    const int64_t all = t.batch * rows * (t.average ? result : 4 * line) * size_of(kType);
    const bool past = all >= kPastCaches && (uintptr_t)t.out % kBytes == 0 && bytes % kBytes == 0;
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t b = k / rows, y = k % rows;
        if (t.average) {
          average_row<kType>(element(t.x, (b * t.height + 2 * y) * line, kType), element(t.out, k * result, kType), columns,
                             t.width, t.channels, past);
        } else {
          repeat_row(element(t.x, k * line, kType), element(t.out, 4 * k * line, kType), columns, bytes, past);
        }
      }
      _mm_sfence();
    };
    parallel_for(t.batch * rows, t.batch * t.height * line < kSerial / 2, body);
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
