// 2^x, erf and the activations made of them, on vectors. Additions, multiplications, divisions and minima in a fixed
// order and never contracted: equal bits at every level, but for `fused` and what is made with it. NaN stays NaN.
// V is F32, or a Group of them.
#pragma once
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

FASTDIFF_ALWAYS F32 splat(float value) { return F32{} + value; }

// N vectors side by side, so that their chains of dependent instructions overlap: of vectors after one another schedulers
// hold three or four (Zen 4, bfloat16, cycles a vector: GELU 20 alone, 14 in fours; SiLU 11 and 9).
template <int N>
struct Group {
  F32 v[N];
};
constexpr int kGroup = kFloats == 16 ? 4 : 2;

template <int N, class F>
FASTDIFF_ALWAYS Group<N> group(F f) {
  Group<N> out;
  FASTDIFF_UNROLL
  for (int k = 0; k < N; ++k) out.v[k] = f(k);
  return out;
}

// f of a vector, or of each of a group
template <class F>
FASTDIFF_ALWAYS F32 each(F32 a, F f) { return f(a); }
template <int N, class F>
FASTDIFF_ALWAYS Group<N> each(const Group<N>& a, F f) {
  return group<N>([&](int k) __attribute__((always_inline)) { return f(a.v[k]); });
}

#define FASTDIFF_LANEWISE(op)                                                              \
  template <int N>                                                                         \
  FASTDIFF_ALWAYS Group<N> operator op(const Group<N>& a, const Group<N>& b) {             \
    return group<N>([&](int k) __attribute__((always_inline)) { return a.v[k] op b.v[k]; });  \
  }                                                                                        \
  template <int N>                                                                         \
  FASTDIFF_ALWAYS Group<N> operator op(const Group<N>& a, float b) {                       \
    return each(a, [&](F32 x) __attribute__((always_inline)) { return x op b; });          \
  }                                                                                        \
  template <int N>                                                                         \
  FASTDIFF_ALWAYS Group<N> operator op(float a, const Group<N>& b) {                       \
    return each(b, [&](F32 x) __attribute__((always_inline)) { return a op x; });          \
  }
FASTDIFF_LANEWISE(+)
FASTDIFF_LANEWISE(-)
FASTDIFF_LANEWISE(*)
FASTDIFF_LANEWISE(/)
#undef FASTDIFF_LANEWISE

FASTDIFF_ALWAYS F32 fused(F32 a, F32 b, F32 c) {
#if defined(__FMA__)
  return (F32)FASTDIFF_MM(fmadd_ps)((NativeF)a, (NativeF)b, (NativeF)c);
#else
  return a * b + c;
#endif
}
FASTDIFF_ALWAYS F32 fused(F32 a, F32 b, float c) { return fused(a, b, splat(c)); }
template <int N>
FASTDIFF_ALWAYS Group<N> fused(const Group<N>& a, const Group<N>& b, float c) {
  return group<N>([&](int k) __attribute__((always_inline)) { return fused(a.v[k], b.v[k], c); });
}
template <class V>
FASTDIFF_ALWAYS V fused(const V& a, float b, float c) {
  return each(a, [&](F32 x) __attribute__((always_inline)) { return fused(x, splat(b), splat(c)); });
}

// The instruction gives its second operand where one is NaN.
template <class V>
FASTDIFF_ALWAYS V at_least(float low, const V& x) {
  const NativeF bound = (NativeF)splat(low);
  return each(x, [&](F32 y) __attribute__((always_inline)) { return (F32)FASTDIFF_MM(max_ps)(bound, (NativeF)y); });
}
template <class V>
FASTDIFF_ALWAYS V at_most(float high, const V& x) {
  const NativeF bound = (NativeF)splat(high);
  return each(x, [&](F32 y) __attribute__((always_inline)) { return (F32)FASTDIFF_MM(min_ps)(bound, (NativeF)y); });
}

// 2^x. Relative error below 2e-7; 0 below -125.5, infinity from 128 on.
template <class V>
FASTDIFF_ALWAYS V power_of_two(V x) {
  x = at_most(128.0f, at_least(-126.0f, x));
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, 126 more as an exponent
  const V shifted = x + 12583038.0f, r = x - (shifted - 12583038.0f);
  V p = r * 0.00265293987f + 0.019343067f;
  p = p * r + 0.111014679f;
  p = p * r + 0.480444849f;
  p = p * r + 1.38629401f;
  p = p * r + 2.0f;
  return p * each(shifted, [](F32 y) __attribute__((always_inline)) { return (F32)((U32)y << 23); });
}

// Relative error below 4.2e-7, exactly 1 and -1 from 3.92 on.
template <class V>
FASTDIFF_ALWAYS V error_function(V x) {
  x = at_most(3.92f, at_least(-3.92f, x));
  const V z = x * x;
  V p = z * 2.0500970e-6f + 2.8488378e-4f;
  V q = z * 3.8091872e-5f + 1.1625394e-3f;
  p = p * z + 3.7656261e-3f;
  q = q * z + 1.4969233e-2f;
  p = p * z + 5.2748755e-2f;
  q = q * z + 1.1410917e-1f;
  p = p * z + 1.9040655e-1f;
  q = q * z + 5.0207615e-1f;
  p = p * z + 1.1283791f;
  q = q * z + 1.0f;
  return at_most(1.0f, at_least(-1.0f, x * p / q));
}

// x * sigmoid(x)
template <class V>
FASTDIFF_ALWAYS V silu(const V& x) { return x / (1.0f + power_of_two(x * -1.44269504f)); }

template <class V>
FASTDIFF_ALWAYS V gelu(const V& x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }

// 0.5 * x * (1 + tanh(u)) is x / (1 + exp(-2 * u)), u = sqrt(2 / pi) * (x + 0.044715 * x^3)
template <class V>
FASTDIFF_ALWAYS V gelu_tanh(const V& x) {
  const V y = x * (x * x * -0.10294324f + -2.3022082f);
  return x / (1.0f + power_of_two(y));
}

// The same for results of one type: bfloat16 shows 2^-9, so what is wrong by less than 2^-12 is as good (Zen 4, in
// bfloat16 and out: SiLU takes 12 cycles a vector for 22).
#if defined(__AVX512F__)

// p 2^floor(x)
FASTDIFF_ALWAYS F32 scaled_by_power(F32 p, F32 x) { return (F32)_mm512_scalef_ps((__m512)p, (__m512)x); }
template <int N>
FASTDIFF_ALWAYS Group<N> scaled_by_power(const Group<N>& p, const Group<N>& x) {
  return group<N>([&](int k) __attribute__((always_inline)) { return scaled_by_power(p.v[k], x.v[k]); });
}

// 2^x with a relative error below 9e-5, exact at integers; 0 and infinity at the infinities.
template <class V>
FASTDIFF_ALWAYS V short_power_of_two(const V& x) {
  const V r = each(x, [](F32 y) __attribute__((always_inline)) {  // 0 at infinities
    return (F32)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  });
  V p = fused(r, 7.7065870e-2f, 0.22764628f);
  p = fused(p, r, 0.69511652f);
  return scaled_by_power(fused(p, r, 1.0f), x);
}

// x / (1 + 2^y)
template <class V>
FASTDIFF_ALWAYS V halved_by_power(const V& x, const V& y) {
  const V sum = 1.0f + short_power_of_two(y);
  return x * each(sum, [](F32 z) __attribute__((always_inline)) { return (F32)_mm512_rcp14_ps((__m512)z); });
}

template <int kOut, class V>
FASTDIFF_ALWAYS V silu_as(const V& x) {
  if constexpr (kOut != kBFloat16) return silu(x);
  return halved_by_power(x, x * -1.44269504f);
}

template <int kOut, class V>
FASTDIFF_ALWAYS V gelu_tanh_as(const V& x) {
  if constexpr (kOut != kBFloat16) return gelu_tanh(x);
  return halved_by_power(x, x * fused(x * x, -0.10294324f, -2.3022082f));
}

// log2(normal(x) / normal(-x)) is x times a polynomial in x^2, where normal is the cumulative distribution
template <int kOut, class V>
FASTDIFF_ALWAYS V gelu_as(const V& x) {
  if constexpr (kOut != kBFloat16) return gelu(x);
  const V z = at_most(16.0f, x * x);
  V q = fused(z, -1.5143081e-6f, 4.2811534e-5f);
  q = fused(q, z, 7.3894455e-4f);
  q = fused(q, z, -0.10633142f);
  q = fused(q, z, -2.3012264f);
  return halved_by_power(x, x * q);
}

#else

template <int, class V>
FASTDIFF_ALWAYS V silu_as(const V& x) { return silu(x); }
template <int, class V>
FASTDIFF_ALWAYS V gelu_tanh_as(const V& x) { return gelu_tanh(x); }
template <int, class V>
FASTDIFF_ALWAYS V gelu_as(const V& x) { return gelu(x); }

#endif

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
