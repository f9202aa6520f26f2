// Products with weights of fewer bits than the multiplier takes: a piece of 128 k of two panels at a time is expanded into
// the cache, and all rows of a block pass over it. Every piece is summed on its own and then scaled into float32 sums.
#pragma once
#include "cpu/linear_formats.h"
#include "cpu/linear_loop.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kPiece = 128;  // k

// How many k the piece that begins at k has: pieces do not cross groups.
FASTDIFF_ALWAYS int64_t piece_at(const Linear& a, int64_t k) {
  const int64_t n = least(kPiece, a.inner - k);
  return a.group ? least(n, a.group - k % a.group) : n;
}

FASTDIFF_ALWAYS int64_t pieces_of(const Linear& a) {
  int64_t pieces = 0;
  for (int64_t k = 0; k < a.inner; k += piece_at(a, k)) ++pieces;
  return pieces;
}

// Scales of 32 columns for the group of k, or ones.
FASTDIFF_ALWAYS void group_scales(float* scale, const Linear& a, int64_t panel, int64_t k) {
  const int64_t column = panel * kPanel, there = least(kUnit * kPanel, a.sums - column);
  const int64_t groups = a.group ? a.inner / a.group : 0;
  const float* from = a.group ? a.group_scale + column * groups + k / a.group : nullptr;
  for (int c = 0; c < kUnit * kPanel; ++c, from += groups) scale[c] = !a.group ? 1.0f : c < there ? *from : 0.0f;
}

// row_first [rows, pieces]: what the sums of a row over a piece begin with; null: zeros
template <class Format, class Kind>
static void multiply_expanded(const Linear& a, const Rows& rows, const Epilogue& e, const int32_t* row_first) {
  constexpr int kWidth = kUnit * kPanel, kSteps = kPiece / kTakes<Kind>;
  const int64_t packed = (a.inner + Format::kPerRow - 1) / Format::kPerRow, pieces = pieces_of(a);
  WriteTile* const write = tile_writer(e);
  for_blocks(a, row_blocks(a.rows, a.inner * 4 / kTakes<Kind>), [&](const Block& b) {
    alignas(64) char expanded[kUnit * kSteps * kStep];
    alignas(64) float sums[kBlockRows * kWidth], scale[kWidth];
    alignas(64) const int32_t zeros[kWidth] = {};
    const bool narrow = b.rows <= kNarrowRows<Kind>;
    memset(sums, 0, size_t(b.rows) * kWidth * sizeof(float));
    for (int64_t k = 0, piece = 0; k < a.inner; k += piece_at(a, k), ++piece) {
      const int64_t count = (piece_at(a, k) + Format::kPerRow - 1) / Format::kPerRow;
      const char* const panels = (const char*)a.weight + (b.panel * packed + k / Format::kPerRow) * kStep;
      group_scales(scale, a, b.panel, k);
      Panels p{panels, count, packed * kStep, zeros, row_first ? pieces : 0, scale, kUnit * packed * kStep};
      if (!narrow) {
        for (int j = 0; j < b.panels; ++j)
          expand_panel<Format, Kind>(expanded + j * kSteps * kStep, panels + j * packed * kStep, count);
        p.data = expanded;
        p.steps = count * kGrows<Format, Kind>;
        p.stride = kSteps * kStep;
        p.later = 0;
      }
      const auto tile = [&](int64_t row, int height) {
        const int64_t first = b.row + row;
        const Rows from{rows.base + first * rows.stride + k * 4 / kTakes<Kind>, rows.stride};
        if (row_first) p.first = row_first + first * pieces + piece;
        (narrow ? multiply_narrow<Format, Kind> : multiply<Kind>)(height, b.panels, from, p, sums + row * kWidth, kWidth);
      };
      narrow ? for_tiles<kNarrowTile<Kind>>(b.rows, tile) : for_tiles<kTileRows<Kind>>(b.rows, tile);
    }
    for_tiles<kMaxTileRows>(b.rows, [&](int64_t row, int height) {
      write(e, sums + row * kWidth, kWidth, b.row + row, height, b.panel, b.panels);
    });
  });
}

// Float rows with the kind that their type asks for.
template <class Format>
static void multiply_floats(const Linear& a) {
  if (a.x_type == kFloat32)
    return multiply_expanded<Format, Floats>(a, float_rows<Floats>(a, Format::kPerRow), a.epilogue, nullptr);
  multiply_expanded<Format, Brains>(a, float_rows<Brains>(a, Format::kPerRow), a.epilogue, nullptr);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
