// The tile of a convolution: pixels wherever they lie, times the panels of a group.
#pragma once
#include "cpu/conv2d_areas.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace convolution {

// 6 rows of 4 panels need fewer loads per product than 14 rows of 2, and their 6 addresses fit in registers
#if defined(__AVX512F__)
constexpr int kMostPanels = 4, kTileNumbers = 28 * kPanel;
#else
constexpr int kMostPanels = 1, kTileNumbers = 6 * kPanel;
#endif
constexpr int kMostRows = 14, kGroupColumns = kMostPanels * kPanel;

// Rows of a tile in groups of so many panels: together they fill the registers.
template <class Kind>
constexpr int rows_for(int group_panels) {
  if (kMostPanels == 1) return Kind::kRows;
  return group_panels == 4 ? 6 : group_panels == 3 ? 8 : 14;
}

struct Pixel {
  int64_t sample, y, x;
};

// `count` pixels of an area, and `rows` >= count that are computed.
struct Tile {
  const Area* area;
  int count, rows;
  Pixel pixel[kMostRows];
};

// Steps [first, last) of the k of one segment; `begins` and `ends` where they are the first and last of a sum.
struct Chunk {
  int segment;
  int64_t first, last;
  bool begins, ends;
};

// What a tile is multiplied by: a group's panels from the first step of a segment on.
struct Right {
  const char* panel;
  int64_t panel_bytes;
  int group_panels, panels;
  const int32_t* start;  // what sums begin with
};

// sums [R, 16 P]: as the registers have them between chunks, float32 after the last one
template <class Kind, int R, int P>
static __attribute__((noinline)) void multiply_chunk(const char* const* row, const Plane2d& p, const Area& area,
                                                     const Chunk& k, const Right& right, int32_t* sums) {
  constexpr int kVectors = P * kParts;
  Sums<Kind, R, P> sum;
  if (k.begins) {
    start<Kind, R, P>(sum, right.start);
  } else {
    FASTDIFF_UNROLL_ALL
    for (int i = 0; i < R; ++i) {
      FASTDIFF_UNROLL_ALL
      for (int j = 0; j < kVectors; ++j) sum[i][j] = load<typename Kind::Sum>(sums + (i * kVectors + j) * kFloats);
    }
  }
  const int64_t tap_steps = p.pitch / 4;
  for (int64_t y = area.y.tap; y < area.y.tap + area.y.taps; ++y) {
    const int64_t line = y * p.line_steps, begin = line + area.x.tap * tap_steps, end = begin + area.x.taps * tap_steps;
    const int64_t first = begin > k.first ? begin : k.first, last = at_most_i(end, k.last);
    if (first < last)
      accumulate<Kind>(sum, RowPointers{row, y * p.line + (first - line) * 4}, last - first, right.panel + first * kStep,
                       right.panel_bytes);
  }
  if (k.ends) return finish<Kind>(sum, (float*)sums, P * kPanel);
  FASTDIFF_UNROLL_ALL
  for (int i = 0; i < R; ++i) {
    FASTDIFF_UNROLL_ALL
    for (int j = 0; j < kVectors; ++j) store(sums + (i * kVectors + j) * kFloats, sum[i][j]);
  }
}

// Tiles of an area's last rows are lower; the last group may have fewer panels than the others.
template <class Kind, int G, int P = G>
FASTDIFF_ALWAYS void multiply_group(int rows, const char* const* row, const Plane2d& p, const Area& area, const Chunk& k,
                                    const Right& right, int32_t* sums) {
  constexpr int R = rows_for<Kind>(G), kMiddle = last_rows(R, (R + 2) / 3 + 1), kLow = last_rows(R, 1);
  if constexpr (P > 1) {
    if (right.panels < P) return multiply_group<Kind, G, P - 1>(rows, row, p, area, k, right, sums);
  }
  if (rows == R) return multiply_chunk<Kind, R, P>(row, p, area, k, right, sums);
  if (rows == kMiddle) return multiply_chunk<Kind, kMiddle, P>(row, p, area, k, right, sums);
  multiply_chunk<Kind, kLow, P>(row, p, area, k, right, sums);
}

template <class Kind>
static void multiply_tile(const Tile& t, const Plane2d& p, int64_t stride, const Chunk& k, const Right& right,
                          int32_t* sums) {
  const char* row[kMostRows];
  for (int i = 0; i < t.rows; ++i) {
    const Pixel& at = t.pixel[i < t.count ? i : t.count - 1];
    row[i] = p.base + (at.sample * p.height + at.y * stride) * p.line + at.x * stride * p.pitch;
  }
  if constexpr (kMostPanels == 4) {
    if (right.group_panels == 4) return multiply_group<Kind, 4>(t.rows, row, p, *t.area, k, right, sums);
    if (right.group_panels == 3) return multiply_group<Kind, 3>(t.rows, row, p, *t.area, k, right, sums);
    if (right.group_panels == 2) return multiply_group<Kind, 2>(t.rows, row, p, *t.area, k, right, sums);
  }
  multiply_group<Kind, 1>(t.rows, row, p, *t.area, k, right, sums);
}

}  // namespace convolution
}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
