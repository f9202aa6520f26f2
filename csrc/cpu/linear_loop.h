// How a matrix product is cut into tiles, and tiles into tasks of threads.
#pragma once
#include "cpu/epilogue_tile.h"
#include "cpu/linear_rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kUnit = 2;                        // panels that a task works on: a value and its gate
constexpr int64_t kBlockBytes = 384 << 10;      // of rows: what stays in 1 MB of L2 beside panels
constexpr int64_t kBlockRows = 256;
constexpr int64_t kSerialProducts = 1 << 17;    // that one thread multiplies in the time two need to start

FASTDIFF_ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Block {
  int64_t row, rows, panel;
  int panels;
};

// Calls run(Block) for every block of rows and every unit of panels. Threads take neighbouring units.
template <class Run>
static void for_blocks(const Linear& a, int64_t row_bytes, Run run) {
  if (a.rows <= 0 || a.epilogue.columns <= 0) return;
  int64_t most = row_bytes > 0 ? kBlockBytes / row_bytes : kBlockRows;
  most = most < 28 ? 28 : least(most, kBlockRows);
  const int64_t blocks = (a.rows + most - 1) / most, units = (a.panels + kUnit - 1) / kUnit;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / units, first = a.rows * b / blocks, panel = task % units * kUnit;
      run(Block{first, a.rows * (b + 1) / blocks - first, panel, int(least(kUnit, a.panels - panel))});
    }
  };
  parallel_for(blocks * units, a.rows * a.inner * a.panels * kPanel < kSerialProducts, body);
}

// Calls run(first, count) for tiles of about equal height.
template <int kRows, class Run>
FASTDIFF_ALWAYS void for_tiles(int64_t rows, Run run) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles;
    run(first, int(rows * (t + 1) / tiles - first));
  }
}

// What the sums of 32 columns begin with: minus what the offset of the codes adds to them.
FASTDIFF_ALWAYS void begin_sums(int32_t* first, const Linear& a, int64_t panel) {
  for (int c = 0; c < kUnit * kPanel; ++c) {
    const int64_t column = panel * kPanel + c;
    first[c] = kCodeOffset && a.weight_sum && column < a.sums ? -kCodeOffset * a.weight_sum[column] : 0;
  }
}

// The product with panels as they lie in memory.
template <class Kind>
static void multiply_direct(const Linear& a, const Rows& rows, int64_t steps, const Epilogue& e) {
  WriteTile* const write = tile_writer(e);
  for_blocks(a, steps * 4, [&](const Block& b) {
    alignas(64) float sums[kMaxTileRows * kUnit * kPanel];
    alignas(64) int32_t first[kUnit * kPanel];
    begin_sums(first, a, b.panel);
    const Panels panels{(const char*)a.weight + b.panel * steps * kStep, steps, steps * kStep, first, 0, nullptr};
    for_tiles<kTileRows<Kind>>(b.rows, [&](int64_t row, int count) {
      const Rows tile{rows.base + (b.row + row) * rows.stride, rows.stride};
      multiply<Kind>(count, b.panels, tile, panels, sums, kUnit * kPanel);
      write(e, sums, kUnit * kPanel, b.row + row, count, b.panel, b.panels);
    });
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
