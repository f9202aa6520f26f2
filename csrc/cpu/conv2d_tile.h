// The tile of a convolution: pixels wherever they lie, times the panels of a group.
#pragma once
#include "cpu/conv2d_fill.h"
#include "cpu/tile.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

// 6 rows of 4 panels need fewer loads per product than 14 rows of 2, and their 6 addresses fit in registers
#if defined(__AVX512F__)
constexpr int kMostPanels = 4, kMostNumbers = 28 * kPanel;
#else
constexpr int kMostPanels = 1, kMostNumbers = 6 * kPanel;
#endif
constexpr int kMostRows = 14, kTileNumbers = kMostNumbers, kGroupColumns = kMostPanels * kPanel;

// Rows of a tile in groups of so many panels: together they fill the registers.
template <class Kind>
constexpr int rows_for(int group_panels) {
  if (kMostPanels == 1) return Kind::kRows;
  return group_panels == 4 ? 6 : group_panels == 3 ? 8 : 14;
}

// Output pixels [first, first + count).
struct Tile {
  int64_t first;
  int count;
  const char* row[kMostRows];
};

// Steps [first, last) of the k of one segment; `begins` and `ends` where they are the first and last of a sum.
struct Chunk {
  int segment;
  int64_t first, last;
  bool begins, ends;
};

// sums [R, 16 P]: as the registers have them between chunks, float32 after the last one
template <class Kind, int R, int P>
static __attribute__((noinline)) void multiply_chunk(const char* const* row, const Plane2d& p, const Chunk& k,
                                                     const char* panel, int64_t panel_bytes, const int32_t* start_at,
                                                     int32_t* sums) {
  constexpr int kVectors = P * kParts;
  Sums<Kind, R, P> sum;
  if (k.begins) {
    start<Kind, R, P>(sum, start_at);
  } else {
    FASTDIFF_UNROLL_ALL
    for (int i = 0; i < R; ++i) {
      FASTDIFF_UNROLL_ALL
      for (int j = 0; j < kVectors; ++j) sum[i][j] = load<typename Kind::Sum>(sums + (i * kVectors + j) * kFloats);
    }
  }
  int64_t line = k.first / p.line_steps, in = k.first - line * p.line_steps;
  for (int64_t left = k.last - k.first; left > 0; ++line, in = 0) {
    const int64_t steps = at_most_i(p.line_steps - in, left);
    accumulate<Kind>(sum, RowPointers{row, line * p.line + in * 4}, steps, panel, panel_bytes);
    panel += steps * kStep;
    left -= steps;
  }
  if (k.ends) return finish<Kind>(sum, (float*)sums, P * kPanel);
  FASTDIFF_UNROLL_ALL
  for (int i = 0; i < R; ++i) {
    FASTDIFF_UNROLL_ALL
    for (int j = 0; j < kVectors; ++j) store(sums + (i * kVectors + j) * kFloats, sum[i][j]);
  }
}

template <class Kind, int G, int P = G>
FASTDIFF_ALWAYS void multiply_group(int panels, const Tile& t, const Plane2d& p, const Chunk& k, const char* panel,
                                    int64_t panel_bytes, const int32_t* start_at, int32_t* sums) {
  if constexpr (P > 1) {
    if (panels < P) return multiply_group<Kind, G, P - 1>(panels, t, p, k, panel, panel_bytes, start_at, sums);
  }
  multiply_chunk<Kind, rows_for<Kind>(G), P>(t.row, p, k, panel, panel_bytes, start_at, sums);
}

// One tile of a group: the last group may have fewer panels than the others.
template <class Kind>
static void multiply_tile(int group_panels, int panels, const Tile& t, const Plane2d& p, const Chunk& k, const char* panel,
                          int64_t panel_bytes, const int32_t* start_at, int32_t* sums) {
  if constexpr (kMostPanels == 4) {
    if (group_panels == 4) return multiply_group<Kind, 4>(panels, t, p, k, panel, panel_bytes, start_at, sums);
    if (group_panels == 3) return multiply_group<Kind, 3>(panels, t, p, k, panel, panel_bytes, start_at, sums);
    if (group_panels == 2) return multiply_group<Kind, 2>(panels, t, p, k, panel, panel_bytes, start_at, sums);
  }
  multiply_group<Kind, 1>(panels, t, p, k, panel, panel_bytes, start_at, sums);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
