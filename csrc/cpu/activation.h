// Activations of float32 vectors. Errors against float64 over all floats: below 2.2e-7 times max(1, |result|).
#pragma once
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

FASTDIFF_ALWAYS F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__FMA__)
  return (F32)FASTDIFF_MM(fmadd_ps)((NativeF)a, (NativeF)b, (NativeF)c);
#else
  return a * b + c;
#endif
}

// to the nearest integer, ties to even; the indefinite integer where there is none
FASTDIFF_ALWAYS I32 nearest(F32 v) { return (I32)FASTDIFF_MM(cvtps_epi32)((NativeF)v); }

FASTDIFF_ALWAYS F32 splat(float v) { return F32{} + v; }

// not NaN: NaN stays
FASTDIFF_ALWAYS F32 at_least(F32 v, float bound) {
  return (F32)FASTDIFF_MM(max_ps)((NativeF)splat(bound), (NativeF)v);
}
FASTDIFF_ALWAYS F32 at_most(F32 v, float bound) {
  return (F32)FASTDIFF_MM(min_ps)((NativeF)splat(bound), (NativeF)v);
}

// a / b to two units in the last place, for b in [2^-126, 2^126]
FASTDIFF_ALWAYS F32 quotient(F32 a, F32 b) {
#if defined(__AVX512F__)
  const F32 guess = (F32)_mm512_rcp14_ps((__m512)b);  // a division takes 10 cycles, this 4 (Zen 4)
  return a * multiply_add(guess, multiply_add(-b, guess, splat(1.0f)), guess);
#else
  return a / b;
#endif
}

// 2^t for t <= 126.9; 0 or a subnormal number below -126
FASTDIFF_ALWAYS F32 power_of_two(F32 t) {
  t = at_least(t, -127.0f);
#if defined(__AVX512F__)
  const F32 whole = (F32)_mm512_roundscale_ps((__m512)t, 0);
#else
  const I32 exponent = nearest(t);
  const F32 whole = __builtin_convertvector(exponent, F32);
#endif
  const F32 f = t - whole;
  F32 y = multiply_add(splat(1.5353362e-4f), f, splat(1.3398874e-3f));
  y = multiply_add(y, f, splat(9.618437e-3f));
  y = multiply_add(y, f, splat(5.5503324e-2f));
  y = multiply_add(y, f, splat(2.4022648e-1f));
  y = multiply_add(y, f, splat(6.931472e-1f));
  y = multiply_add(y, f, splat(1.0f));
#if defined(__AVX512F__)
  return (F32)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  return y * (F32)((exponent + 127) << 23);
#endif
}

FASTDIFF_ALWAYS F32 silu(F32 v) {
  v = at_least(v, -87.0f);  // where the result is -1e-36
  return quotient(v, 1.0f + power_of_two(v * -1.44269504f));
}

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (v + 0.044715 v^3); the constant is -2 sqrt(2 / pi) log2(e)
FASTDIFF_ALWAYS F32 gelu_tanh(F32 v) {
  v = at_least(v, -10.0f);  // where the result is -1e-37
  const F32 cubic = multiply_add(v * v * 0.044715f, v, v);
  return quotient(v, 1.0f + power_of_two(cubic * -2.30220819f));
}

// max(v, 0) - |v| erfc(|v| / sqrt(2)) / 2 with erfc as the -8th power of a polynomial (after Abramowitz and Stegun 1964,
// 7.1.28, fitted anew)
FASTDIFF_ALWAYS F32 gelu(F32 v) {
  const F32 a = at_most((F32)((I32)v & 0x7fffffff), 10.0f);
  F32 p = multiply_add(splat(2.9324988e-6f), a, splat(-1.6747279e-5f));
  p = multiply_add(p, a, splat(9.7582495e-5f));
  p = multiply_add(p, a, splat(1.1135004e-4f));
  p = multiply_add(p, a, splat(9.806636e-4f));
  p = multiply_add(p, a, splat(8.5916305e-3f));
  p = multiply_add(p, a, splat(4.47888e-2f));
  p = multiply_add(p, a, splat(9.9732496e-2f));
  p = multiply_add(p, a, splat(1.0f));
  p = p * p;
  p = p * p;
  return at_least(v, 0.0f) - quotient(0.5f * a, p * p);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
