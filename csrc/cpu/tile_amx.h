// multiply() of tile.h on AMX, for int8 and bfloat16. A panel's 16 steps of 64 bytes are a tile of the right operand as they
// lie in memory, and 16 rows of 64 bytes one of the left: 1 x 2 tiles of sums take 32 cycles for 24 of loads.
#pragma once
#include "cpu/simd.h"
#if defined(FASTDIFF_AMX_EMULATED)
#include "amx_emulated.h"  // tests/native: the same intrinsics in plain C++
#endif

namespace fastdiff {
namespace FASTDIFF_ISA {

// What _tile_loadconfig reads.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// tiles 0, 1: sums; 2: rows; 3, 4: panels; 5, 6, 7: the same for the last steps, fewer than 16
FASTDIFF_ALWAYS void shape_tiles(int count, int last) {
  alignas(64) TileShapes shapes = {};
  shapes.palette = 1;
  for (int t = 0; t < 8; ++t) {
    const bool tail = t > 4, left = t == 2 || t == 5, right = t > 2 && !left;
    shapes.rows[t] = uint8_t(right ? (tail ? last : 16) : count);
    shapes.row_bytes[t] = uint16_t(tail && left ? last * 4 : 64);
    if (tail && last == 0) shapes.rows[t] = shapes.row_bytes[t] = 0;
  }
  asm volatile("" ::"r"(&shapes) : "memory");  // the intrinsics do not say what they read
  _tile_loadconfig(&shapes);
}

#define FASTDIFF_TILE_DOT(sums, left, right) \
  if constexpr (kCodes) {                    \
    _tile_dpbusd(sums, left, right);         \
  } else {                                   \
    _tile_dpbf16ps(sums, left, right);       \
  }

// sums [count, 2 * 16] of either type = first + rows * panels; reads nothing past `steps`
template <bool kCodes>
FASTDIFF_ALWAYS void multiply_tiles(int count, int panels, const char* base, int64_t stride, const char* panel,
                                    int64_t panel_stride, int64_t steps, const int32_t* first, void* sums) {
  shape_tiles(count, int(steps % 16));
  asm volatile("" ::"r"(first), "r"(base), "r"(panel) : "memory");
  const bool two = panels == 2;
  _tile_loadd(0, first, 0);  // all rows alike
  if (two) _tile_loadd(1, first + 16, 0);
  int64_t s = 0;
  for (; s + 16 <= steps; s += 16) {
    _tile_loadd(2, base + s * 4, stride);
    _tile_loadd(3, panel + s * 64, 64);
    FASTDIFF_TILE_DOT(0, 2, 3)
    if (!two) continue;
    _tile_loadd(4, panel + panel_stride + s * 64, 64);
    FASTDIFF_TILE_DOT(1, 2, 4)
  }
  if (s < steps) {
    _tile_loadd(5, base + s * 4, stride);
    _tile_loadd(6, panel + s * 64, 64);
    FASTDIFF_TILE_DOT(0, 5, 6)
    if (two) {
      _tile_loadd(7, panel + panel_stride + s * 64, 64);
      FASTDIFF_TILE_DOT(1, 5, 7)
    }
  }
  _tile_stored(0, sums, 128);
  if (two) _tile_stored(1, (char*)sums + 64, 128);
  _tile_release();
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
