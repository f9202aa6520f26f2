// 2^x, erf and the activations made of them, on vectors. Additions, multiplications, divisions and minima in a fixed
// order and never contracted: equal bits at every level, but for `fused` and what is made with it. NaN stays NaN.
#pragma once
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

FASTDIFF_ALWAYS F32 splat(float value) { return F32{} + value; }

FASTDIFF_ALWAYS F32 fused(F32 a, F32 b, F32 c) {
#if defined(__FMA__)
  return (F32)FASTDIFF_MM(fmadd_ps)((NativeF)a, (NativeF)b, (NativeF)c);
#else
  return a * b + c;
#endif
}

// The instruction gives its second operand where one is NaN.
FASTDIFF_ALWAYS F32 at_least(float low, F32 x) { return (F32)FASTDIFF_MM(max_ps)((NativeF)splat(low), (NativeF)x); }
FASTDIFF_ALWAYS F32 at_most(float high, F32 x) { return (F32)FASTDIFF_MM(min_ps)((NativeF)splat(high), (NativeF)x); }

// 2^x. Relative error below 2e-7; 0 below -125.5, infinity from 128 on.
FASTDIFF_ALWAYS F32 power_of_two(F32 x) {
  x = at_most(128.0f, at_least(-126.0f, x));
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, 126 more as an exponent
  const F32 shifted = x + 12583038.0f, r = x - (shifted - 12583038.0f);
  F32 p = r * 0.00265293987f + 0.019343067f;
  p = p * r + 0.111014679f;
  p = p * r + 0.480444849f;
  p = p * r + 1.38629401f;
  p = p * r + 2.0f;
  return p * (F32)((U32)shifted << 23);
}

// Relative error below 4.2e-7, exactly 1 and -1 from 3.92 on.
FASTDIFF_ALWAYS F32 error_function(F32 x) {
  x = at_most(3.92f, at_least(-3.92f, x));
  const F32 z = x * x;
  F32 p = z * 2.0500970e-6f + 2.8488378e-4f;
  F32 q = z * 3.8091872e-5f + 1.1625394e-3f;
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
FASTDIFF_ALWAYS F32 silu(F32 x) { return x / (1.0f + power_of_two(x * -1.44269504f)); }

FASTDIFF_ALWAYS F32 gelu(F32 x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }

// 0.5 * x * (1 + tanh(u)) is x / (1 + exp(-2 * u)), u = sqrt(2 / pi) * (x + 0.044715 * x^3)
FASTDIFF_ALWAYS F32 gelu_tanh(F32 x) {
  const F32 y = x * (x * x * -0.10294324f + -2.3022082f);
  return x / (1.0f + power_of_two(y));
}

// The same for results of one type: bfloat16 shows 2^-9, so what is wrong by less than 2^-12 is as good (Zen 4, in
// bfloat16 and out: SiLU takes 12 cycles a vector for 22).
#if defined(__AVX512F__)

// 2^x with a relative error below 9e-5, exact at integers; 0 and infinity at the infinities.
FASTDIFF_ALWAYS F32 short_power_of_two(F32 x) {
  const F32 r = (F32)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 at infinities
  F32 p = fused(r, splat(7.7065870e-2f), splat(0.22764628f));
  p = fused(p, r, splat(0.69511652f));
  return (F32)_mm512_scalef_ps((__m512)fused(p, r, splat(1.0f)), (__m512)x);
}

// x / (1 + 2^y)
FASTDIFF_ALWAYS F32 halved_by_power(F32 x, F32 y) {
  return x * (F32)_mm512_rcp14_ps((__m512)(1.0f + short_power_of_two(y)));
}

template <int kOut>
FASTDIFF_ALWAYS F32 silu_as(F32 x) {
  return kOut == kBFloat16 ? halved_by_power(x, x * -1.44269504f) : silu(x);
}

template <int kOut>
FASTDIFF_ALWAYS F32 gelu_tanh_as(F32 x) {
  if (kOut != kBFloat16) return gelu_tanh(x);
  return halved_by_power(x, x * fused(x * x, splat(-0.10294324f), splat(-2.3022082f)));
}

// log2(normal(x) / normal(-x)) is x times a polynomial in x^2, where normal is the cumulative distribution
template <int kOut>
FASTDIFF_ALWAYS F32 gelu_as(F32 x) {
  if (kOut != kBFloat16) return gelu(x);
  const F32 z = at_most(16.0f, x * x);
  F32 q = fused(z, splat(-1.5143081e-6f), splat(4.2811534e-5f));
  q = fused(q, z, splat(7.3894455e-4f));
  q = fused(q, z, splat(-0.10633142f));
  q = fused(q, z, splat(-2.3012264f));
  return halved_by_power(x, x * q);
}

#else

template <int>
FASTDIFF_ALWAYS F32 silu_as(F32 x) { return silu(x); }
template <int>
FASTDIFF_ALWAYS F32 gelu_tanh_as(F32 x) { return gelu_tanh(x); }
template <int>
FASTDIFF_ALWAYS F32 gelu_as(F32 x) { return gelu(x); }

#endif

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
