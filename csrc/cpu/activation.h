// Activations of float32 vectors. Errors against float64 over all floats: below 2e-7 times max(1, |result|).
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

// 2^t; 0 below -126 and infinity from 127.5 on
FASTDIFF_ALWAYS F32 power_of_two(F32 t) {
  t = t > 128.0f ? splat(128.0f) : t;
  t = t < -127.0f ? splat(-127.0f) : t;
  const I32 whole = nearest(t);
  const F32 f = t - __builtin_convertvector(whole, F32);
  F32 y = multiply_add(splat(1.5353362e-4f), f, splat(1.3398874e-3f));
  y = multiply_add(y, f, splat(9.618437e-3f));
  y = multiply_add(y, f, splat(5.5503324e-2f));
  y = multiply_add(y, f, splat(2.4022648e-1f));
  y = multiply_add(y, f, splat(6.931472e-1f));
  y = multiply_add(y, f, splat(1.0f));
  return y * (F32)((whole + 127) << 23);
}

FASTDIFF_ALWAYS F32 silu(F32 v) { return v / (1.0f + power_of_two(v * -1.44269504f)); }

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (v + 0.044715 v^3); the constant is -2 sqrt(2 / pi) log2(e)
FASTDIFF_ALWAYS F32 gelu_tanh(F32 v) {
  const F32 cubic = multiply_add(v * v * 0.044715f, v, v);
  return v / (1.0f + power_of_two(cubic * -2.30220819f));
}

// max(v, 0) - |v| erfc(|v| / sqrt(2)) / 2 with erfc as the -8th power of a polynomial (after Abramowitz and Stegun 1964,
// 7.1.28, fitted anew)
FASTDIFF_ALWAYS F32 gelu(F32 v) {
  F32 a = v < 0.0f ? -v : v;
  a = a > 10.0f ? splat(10.0f) : a;
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
  return (v > 0.0f ? v : F32{}) - 0.5f * a / (p * p);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
