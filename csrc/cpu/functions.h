// 2^x, erf and the activations made of them, on vectors. Additions, multiplications, divisions and minima in a fixed
// order and never contracted: equal bits at every level. NaN stays NaN.
#pragma once
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

FASTDIFF_ALWAYS F32 splat(float value) { return F32{} + value; }

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

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
