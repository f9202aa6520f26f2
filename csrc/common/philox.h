// Philox4x32-10 and Box-Muller exactly as fastdiff/ops/philox_normal.py defines them: shared by the CPU and CUDA kernels.
// Compile with -ffp-contract=off (host) or -fmad=false (nvcc): a contracted multiply-add changes the bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDIFF_HD __host__ __device__ __forceinline__
#else
#define FASTDIFF_HD inline
#endif

namespace fastdiff {

struct Words {
  uint32_t w[4];
};

struct Normals {
  float z[4];
};

FASTDIFF_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTDIFF_HD uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Philox4x32-10 (Salmon et al. 2011, table 2): key = seed, counter = (block, step, stream).
FASTDIFF_HD Words philox(uint64_t seed, uint64_t block, uint32_t step, uint32_t stream) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = step, c3 = stream;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    const uint32_t next0 = uint32_t(p1 >> 32) ^ c1 ^ key0, next2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = next0;
    c2 = next2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// ln(u) for normal u > 0: exponent + polynomial around 1.
FASTDIFF_HD float log_polynomial(float u) {
  const uint32_t bits = bits_from_float(u);
  const int32_t exponent = int32_t(bits - 0x3F3504F3u) >> 23;
  const float f = float_from_bits(bits - (uint32_t(exponent) << 23)) - 1.0f;
  const float z = f * f, e = float(exponent);
  float p = 7.0376836292e-2f;
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = p * f * z + -2.12194440e-4f * e;
  y = y - 0.5f * z;
  return (f + y) + 0.693359375f * e;
}

FASTDIFF_HD float sqrt_rounded(float value) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(value);
#else
  return std::sqrt(value);
#endif
}

// Two normals from two words.
FASTDIFF_HD void box_muller(uint32_t word0, uint32_t word1, float& first, float& second) {
  const float uniform = float(word0) * 0x1p-32f + 0x1p-33f;
  const float radius = sqrt_rounded(-2.0f * log_polynomial(uniform));
  const uint32_t quadrant = word1 >> 30;
  const float angle =
      float(int32_t(word1 & 0x3FFFFFFFu) - 0x20000000) * float(1.5707963267948966 * 0x1p-30);
  const float z = angle * angle;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z + -1.6666654611e-1f;
  const float sine = s * z * angle + angle;
  float c = 2.443315711809948e-5f;
  c = c * z + -1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  const float cosine = c * (z * z) - 0.5f * z + 1.0f;
  const bool swap = quadrant & 1;
  const float a = swap ? sine : cosine, b = swap ? cosine : sine;
  // quadrant q turns (cos, sin) by q * pi/2
  first = radius * ((quadrant == 1 || quadrant == 2) ? -a : a);
  second = radius * (quadrant >= 2 ? -b : b);
}

// The normals of elements 4 * block .. 4 * block + 3.
FASTDIFF_HD Normals philox_normals(uint64_t seed, uint64_t block, uint32_t step, uint32_t stream) {
  const Words words = philox(seed, block, step, stream);
  Normals out;
  box_muller(words.w[0], words.w[1], out.z[0], out.z[1]);
  box_muller(words.w[2], words.w[3], out.z[2], out.z[3]);
  return out;
}

}  // namespace fastdiff
