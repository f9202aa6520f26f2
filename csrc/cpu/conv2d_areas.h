// Which output pixels see the same taps of the kernel inside the image: the rest of the taps would multiply zeros. At
// 8 x 8 pixels a 3 x 3 kernel saves a sixth of its products.
#pragma once
#include "cpu/conv2d.h"
#include "cpu/conv2d_fill.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace convolution {

// Output rows or columns [first, first + count), all of whose taps [tap, tap + taps) lie inside the image, and no others.
struct Band {
  int64_t first, count, tap, taps;
};

// Pixels of every sample where a band of rows meets one of columns. Costs are those of whole tiles, in no unit.
struct Area {
  Band y, x;
  int64_t pixels, tiles, cost, first_cost;
};

constexpr int kMostBands = 7;  // a kernel of 7 without stride has that many; larger ones are not cut

struct Areas {
  Area area[kMostBands * kMostBands];
  int count;
  int64_t cost;
};

// Rows that the last tile of an area computes: all, about two thirds or about a third of `rows`.
constexpr int last_rows(int rows, int64_t count) {
  return count > (2 * rows + 2) / 3 ? rows : count > (rows + 2) / 3 ? (2 * rows + 2) / 3 : (rows + 2) / 3;
}

static int find_bands(Band* band, const Conv2d& c, int64_t out, int64_t in, int64_t before, bool cut) {
  int n = 0;
  for (int64_t i = 0; cut && i < out; ++i) {
    const int64_t start = before - i * c.stride, low = start > 0 ? start : 0, high = at_most_i(c.kernel, in + start);
    const int64_t taps = high > low ? high - low : 0, tap = taps ? low : 0;
    if (n > 0 && band[n - 1].tap == tap && band[n - 1].taps == taps) {
      ++band[n - 1].count;
    } else if (n == kMostBands) {
      cut = false;
    } else {
      band[n++] = {i, 1, tap, taps};
    }
  }
  if (!cut) band[0] = {0, out, 0, c.kernel};
  return cut ? n : 1;
}

// Sums up what tiles of so many rows cost where rows and columns of pixels are cut into bands, or not.
static int64_t cut_areas(Areas& a, const Conv2d& c, int rows, bool cut_y, bool cut_x) {
  Band y[kMostBands], x[kMostBands];
  const int ys = find_bands(y, c, c.out_height, c.height * c.upsample, c.top, cut_y);
  const int xs = find_bands(x, c, c.out_width, c.width * c.upsample, c.left, cut_x);
  int64_t total = 0;
  a.count = 0;
  a.cost = 0;
  for (int i = 0; i < ys; ++i)
    for (int j = 0; j < xs; ++j) {
      const int64_t pixels = c.batch * y[i].count * x[j].count, tiles = (pixels + rows - 1) / rows;
      const int64_t of_row = 4 * y[i].taps * x[j].taps + 1, rest = pixels - (tiles - 1) * rows;
      a.area[a.count++] = {y[i], x[j], pixels, tiles, of_row * rows, a.cost};
      a.cost += tiles * rows * of_row;
      total += ((tiles - 1) * rows + last_rows(rows, rest)) * of_row;
    }
  return total;
}

// The cheapest cut. Small images lose more by tiles that are not full than they save.
static void find_areas(Areas& best, const Conv2d& c, int rows) {
  int64_t least = cut_areas(best, c, rows, false, false);
  for (int way = 1; way < 4; ++way) {
    Areas a;
    const int64_t cost = cut_areas(a, c, rows, way & 1, way & 2);
    if (cost >= least) continue;
    least = cost;
    best = a;
  }
}

}  // namespace convolution
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
