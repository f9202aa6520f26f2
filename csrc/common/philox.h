// Philox4x32-10 (Salmon et al. 2011) and Box-Muller, written once for scalars (CUDA) and for vectors (CPU).
//
// S names the types and the few operations that need an instruction:
//   F, I, U         float, int32 and uint32: scalars, or vectors with as many lanes each
//   multiply(a, m, low, high)    the two halves of the 64-bit product of a and the constant m
//   to_float(I), to_float(U)     round to nearest even
//   bits(F), from_bits(I)        reinterpret
//   square_root(F)               correctly rounded
// Nothing else rounds than +, - and * in the order written here, so every S gives the same bits. That holds only while
// the compiler contracts nothing: -ffp-contract=off, nvcc -fmad=false.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTDIFF_INLINE __host__ __device__ __forceinline__
#else
#define FASTDIFF_INLINE static inline __attribute__((always_inline))
#endif

namespace fastdiff {

// c: the counter, then the four random words. key: the two halves of the seed.
template <class S>
FASTDIFF_INLINE void philox(typename S::U (&c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    typename S::U low0, high0, low1, high1;
    S::multiply(c[0], 0xD2511F53u, low0, high0);
    S::multiply(c[2], 0xCD9E8D57u, low1, high1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// ln(u) for u in (0, 1]
template <class S>
FASTDIFF_INLINE typename S::F natural_log(typename S::F u) {
  const typename S::I bits = S::bits(u), exponent = (bits - 0x3F3504F3) >> 23;
  const typename S::F f = S::from_bits(bits - exponent * 0x800000) - 1.0f, z = f * f, e = S::to_float(exponent);
  typename S::F y = f * 7.0376836292e-2f + -1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f + -1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f + -1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f + -2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z + -2.12194440e-4f * e;
  y = y - 0.5f * z;
  return (f + y) + 0.693359375f * e;
}

// Two normals from two random words.
template <class S>
FASTDIFF_INLINE void box_muller(typename S::U word0, typename S::U word1, typename S::F& first, typename S::F& second) {
  const typename S::F uniform = S::to_float(word0) * 0x1p-32f + 0x1p-33f;
  const typename S::F radius = S::square_root(-2.0f * natural_log<S>(uniform));
  const typename S::U quadrant = word1 >> 30;
  const typename S::F angle = S::to_float((typename S::I)(word1 & 0x3FFFFFFFu) - 0x20000000) * 1.4629180792671596e-9f;
  const typename S::F z = angle * angle;
  typename S::F sine = z * -1.9515295891e-4f + 8.3321608736e-3f;
  sine = (sine * z + -1.6666654611e-1f) * z * angle + angle;
  typename S::F cosine = z * 2.443315711809948e-5f + -1.388731625493765e-3f;
  cosine = (cosine * z + 4.166664568298827e-2f) * (z * z) - 0.5f * z + 1.0f;
  const auto swap = (quadrant & 1u) != 0u;
  const typename S::F x = swap ? sine : cosine, y = swap ? cosine : sine;
  // quadrant q turns (cosine, sine) by q * pi / 2: signs flip for x when q is 1 or 2, for y when q is 2 or 3
  const typename S::U flip_x = ((quadrant + 1u) & 2u) << 30, flip_y = (quadrant & 2u) << 30;
  first = radius * S::from_bits(S::bits(x) ^ (typename S::I)flip_x);
  second = radius * S::from_bits(S::bits(y) ^ (typename S::I)flip_y);
}

// The four normals of elements 4 * block .. 4 * block + 3. The low and high half of the block may be vectors.
template <class S>
FASTDIFF_INLINE void philox_normal4(uint64_t seed, uint32_t step, uint32_t stream, typename S::U block_low,
                                    typename S::U block_high, typename S::F (&out)[4]) {
  typename S::U c[4] = {block_low, block_high, S::splat(step), S::splat(stream)};
  philox<S>(c, uint32_t(seed), uint32_t(seed >> 32));
  box_muller<S>(c[0], c[1], out[0], out[1]);
  box_muller<S>(c[2], c[3], out[2], out[3]);
}

#if defined(__CUDACC__)
// The S of one CUDA thread.
struct Scalar {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  FASTDIFF_INLINE static U splat(uint32_t value) { return value; }
  FASTDIFF_INLINE static void multiply(U a, uint32_t m, U& low, U& high) {
    const uint64_t product = uint64_t(a) * m;
    low = uint32_t(product);
    high = uint32_t(product >> 32);
  }
  FASTDIFF_INLINE static F to_float(I value) { return float(value); }
  FASTDIFF_INLINE static F to_float(U value) { return float(value); }
#if defined(__CUDA_ARCH__)
  FASTDIFF_INLINE static I bits(F value) { return __float_as_int(value); }
  FASTDIFF_INLINE static F from_bits(I value) { return __int_as_float(value); }
  FASTDIFF_INLINE static F square_root(F value) { return __fsqrt_rn(value); }
#else
  FASTDIFF_INLINE static I bits(F value) { return *reinterpret_cast<I*>(&value); }
  FASTDIFF_INLINE static F from_bits(I value) { return *reinterpret_cast<F*>(&value); }
  FASTDIFF_INLINE static F square_root(F value) { return __builtin_sqrtf(value); }
#endif
};
#endif

}  // namespace fastdiff
