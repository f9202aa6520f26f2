// How a matrix product is cut into tiles, and tiles into tasks of threads.
#pragma once
#include "cpu/epilogue_tile.h"
#include "cpu/linear_rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kBlockBytes = 768 << 10;      // of rows: what stays in 1 MB of L2 beside panels
constexpr int64_t kBlockRows = 256;
constexpr int64_t kOwnRows = 32;                // of a block, for which its panels may be read by every thread
constexpr int64_t kFewRows = 28;                // up to which products wait for memory
constexpr int64_t kSerialProducts = 1 << 17;    // that one thread multiplies in the time two need to start

FASTDIFF_ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Block {
  int64_t row, rows, panel;
  int panels;
};

// How many blocks rows of so many bytes make.
static inline int64_t row_blocks(int64_t rows, int64_t row_bytes) {
  const int64_t most = row_bytes > 0 ? kBlockBytes / row_bytes : kBlockRows;
  return (rows - 1) / (most < 28 ? 28 : least(most, kBlockRows)) + 1;
}

// The same number for every thread, where they have the rows for it: norms before and after the product, which share
// their rows out too, then find them in the cache of their own core.
static inline int64_t even_row_blocks(int64_t rows, int64_t row_bytes) {
  const int64_t blocks = row_blocks(rows, row_bytes), threads = parallel_threads();
  const int64_t even = (blocks + threads - 1) / threads * threads;
  return rows >= even * kOwnRows ? even : blocks;
}

// Calls run(Block) for every block of rows and every unit of panels. Threads take neighbouring units.
template <class Run>
static void for_blocks(const Linear& a, int64_t blocks, Run run) {
  if (a.rows <= 0 || a.epilogue.columns <= 0) return;
  const int64_t units = (a.panels + kUnit - 1) / kUnit;
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
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int count = int(rows / tiles + (t < rows % tiles));
    run(first, count);
    first += count;
  }
}

// What the sums of 32 columns begin with: minus what the offset of the codes adds to them.
FASTDIFF_ALWAYS void begin_sums(int32_t* first, const Linear& a, int64_t panel) {
  for (int c = 0; c < kUnit * kPanel; ++c) {
    const int64_t column = panel * kPanel + c;
    first[c] = kCodeOffset && a.weight_sum && column < a.sums ? -kCodeOffset * a.weight_sum[column] : 0;
  }
}

// Rows of a tile whose epilogue runs beside the next one's products, which leaves registers for it; blocks that don't
// divide into tiles of kBesideRows - 2 to kBesideRows are left to multiply().
constexpr int kBesideRows = 12;

template <class Kind, int A, int T>
constexpr bool kBeside = kTilePanels == 2 && !kOnTiles<Kind> && !__is_same(Kind, Floats) && T != kFloat16 &&
                         (A == kLinear || (T != kFloat32 && A != kSilu && A != kSwiglu));

// What runs beside the products of a tile: the epilogue of the one before, and fetching a part of the next panels.
template <class Writer>
struct Beside {
  Writer writer;
  const char* ahead;
  int64_t advance;
  __attribute__((always_inline)) void prefetch() {
    _mm_prefetch(ahead, _MM_HINT_T1);
    ahead += advance;
  }
  __attribute__((always_inline)) bool more() const { return writer.more(); }
  __attribute__((always_inline)) void next() { writer.next(); }
  __attribute__((always_inline)) void finish() {
    while (more()) next();
  }
};

template <class Kind, int R, class Writer>
static __attribute__((noinline)) void multiply_beside(const Rows& rows, const Panels& p, float* out, Beside<Writer>& beside) {
  Sums<Kind, R, kUnit> sum;
  start<Kind, R, kUnit>(sum, p.first);
  accumulate<Kind>(sum, rows, p.steps, p.data, p.stride, beside);
  beside.finish();
  finish<Kind>(sum, out, kUnit * kPanel);
  beside.writer.start(out, R);
}

template <class Kind, int A, int T>
static void multiply_block_beside(const Rows& rows, const Epilogue& e, const Block& b, const Panels& p) {
  alignas(64) float sums[2][kBesideRows * kUnit * kPanel];
  const int64_t tiles = (b.rows + kBesideRows - 1) / kBesideRows;
  Beside<RowWriter<A, T>> beside{{e, b.row, b.panel, kUnit * kPanel}, p.data + kUnit * p.stride, (kUnit * kStep - 1) / tiles + 1};
  const int64_t height = (b.rows + tiles - 1) / tiles;
  for (int64_t row = 0; row < height; ++row) beside.writer.prefetch(row);
  beside.writer.ahead = height - 1;  // of the row that follows the one just written
  int side = 0;
  for_tiles<kBesideRows>(b.rows, [&](int64_t row, int count) {
    const Rows tile{rows.base + (b.row + row) * rows.stride, rows.stride};
    if (count == kBesideRows) multiply_beside<Kind, kBesideRows>(tile, p, sums[side], beside);
    if (count == kBesideRows - 1) multiply_beside<Kind, kBesideRows - 1>(tile, p, sums[side], beside);
    if (count == kBesideRows - 2) multiply_beside<Kind, kBesideRows - 2>(tile, p, sums[side], beside);
    side ^= 1;
  });
  beside.writer.ahead = 0;
  beside.finish();
}

// A block of the product with panels as they lie in memory.
template <class Kind, int A, int T>
static void multiply_block(const Rows& rows, const Epilogue& e, const Block& b, const Panels& p) {
  if constexpr (kBeside<Kind, A, T>) {
    if (b.panels == kUnit && is_plain(e, b.panel) && b.rows / ((b.rows + kBesideRows - 1) / kBesideRows) >= kBesideRows - 2)
      return multiply_block_beside<Kind, A, T>(rows, e, b, p);
  }
  alignas(64) float sums[kMaxTileRows * kUnit * kPanel];
  for_tiles<kTileRows<Kind>>(b.rows, [&](int64_t row, int count) {
    const Rows tile{rows.base + (b.row + row) * rows.stride, rows.stride};
    multiply<Kind>(count, b.panels, tile, p, sums, kUnit * kPanel);
    write_tile_as<A, T>(e, sums, kUnit * kPanel, b.row + row, count, b.panel, b.panels);
  });
}

template <class Kind>
struct BlockMultiplier {
  using Function = void(const Rows& rows, const Epilogue& e, const Block& b, const Panels& p);
  template <int A, int T>
  FASTDIFF_ALWAYS Function* get() {
    return multiply_block<Kind, A, T>;
  }
};

// The product with panels as they lie in memory.
template <class Kind>
static void multiply_direct(const Linear& a, const Rows& rows, int64_t steps, const Epilogue& e) {
  auto* const multiply_one = choose<BlockMultiplier<Kind>>(e);
  for_blocks(a, even_row_blocks(a.rows, steps * 4), [&](const Block& b) {
    alignas(64) int32_t first[kUnit * kPanel];
    begin_sums(first, a, b.panel);
    const int64_t stride = steps * kStep, later = b.rows <= kFewRows ? kUnit * stride : 0;
    multiply_one(rows, e, b, {(const char*)a.weight + b.panel * stride, steps, stride, first, 0, nullptr, later});
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
