// Philox normals for a range of elements, at the level this file is compiled for.
#pragma once
#include "common/philox.h"
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kNoiseGroup = 4 * kFloats;  // elements made at once

// Four vectors with the normals of elements 4k .. 4k + 3 in lane k become the same numbers in memory order, given that
// lane l holds block (l % 4) * (kFloats / 4) + l / 4: a 4x4 transpose inside each 128 bits is then all it takes.
FASTDIFF_ALWAYS void store_noise(float* out, const F32 (&z)[4]) {
  const NativeF a = (NativeF)z[0], b = (NativeF)z[1], c = (NativeF)z[2], d = (NativeF)z[3];
  const NativeF ab_low = FASTDIFF_MM(unpacklo_ps)(a, b), ab_high = FASTDIFF_MM(unpackhi_ps)(a, b);
  const NativeF cd_low = FASTDIFF_MM(unpacklo_ps)(c, d), cd_high = FASTDIFF_MM(unpackhi_ps)(c, d);
  store(out, (F32)FASTDIFF_MM(unpacklo_pd)((NativeD)ab_low, (NativeD)cd_low));
  store(out + kFloats, (F32)FASTDIFF_MM(unpackhi_pd)((NativeD)ab_low, (NativeD)cd_low));
  store(out + 2 * kFloats, (F32)FASTDIFF_MM(unpacklo_pd)((NativeD)ab_high, (NativeD)cd_high));
  store(out + 3 * kFloats, (F32)FASTDIFF_MM(unpackhi_pd)((NativeD)ab_high, (NativeD)cd_high));
}

// kNoiseGroup normals of the blocks block, block + 1, ...
FASTDIFF_ALWAYS void make_noise(float* out, uint64_t seed, uint32_t step, uint32_t stream, uint64_t block) {
  U32 low, high;
  for (int lane = 0; lane < kFloats; ++lane) {
    const uint64_t mine = block + (lane % 4) * (kFloats / 4) + lane / 4;
    low[lane] = uint32_t(mine);
    high[lane] = uint32_t(mine >> 32);
  }
  F32 z[4];
  philox_normal4<Lanes>(seed, step, stream, low, high, z);
  store_noise(out, z);
}

// Elements [first, first + n) of one row.
FASTDIFF_ALWAYS void fill_noise(float* out, uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t n) {
  float group[kNoiseGroup];
  int64_t skip = first % 4, block = first / 4;
  while (n > 0) {
    if (skip == 0 && n >= kNoiseGroup) {
      make_noise(out, seed, step, stream, uint64_t(block));
      out += kNoiseGroup;
      n -= kNoiseGroup;
    } else {
      const int64_t count = n < kNoiseGroup - skip ? n : kNoiseGroup - skip;
      make_noise(group, seed, step, stream, uint64_t(block));
      memcpy(out, group + skip, size_t(count) * sizeof(float));
      out += count;
      n -= count;
      // a partial group ends at a multiple of four unless it is the last
      skip = 0;
    }
    block += kNoiseGroup / 4;
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
