// exp, erf and the activations made of them, on vectors. Additions, multiplications, divisions and minima in a fixed
// order and never contracted: equal bits at every level. NaN stays NaN.
#pragma once
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

FASTDIFF_ALWAYS F32 splat(float value) { return F32{} + value; }

// The instruction gives its second operand where one is NaN.
FASTDIFF_ALWAYS F32 at_least(float low, F32 x) { return (F32)FASTDIFF_MM(max_ps)((NativeF)splat(low), (NativeF)x); }
FASTDIFF_ALWAYS F32 at_most(float high, F32 x) { return (F32)FASTDIFF_MM(min_ps)((NativeF)splat(high), (NativeF)x); }

// Relative error below 1.5e-7; 0 below -87.3, infinity above 88.72.
FASTDIFF_ALWAYS F32 exponential(F32 x) {
  x = at_most(89.0f, at_least(-87.3f, x));
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, 126 more as an exponent
  const F32 shifted = x * 1.44269504f + 12583038.0f, n = shifted - 12583038.0f;
  const F32 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // in [-0.347, 0.347]
  F32 p = r * 0.0013814596f + 0.0083687175f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  return (p + p) * (F32)((U32)shifted << 23);
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
FASTDIFF_ALWAYS F32 silu(F32 x) { return x / (1.0f + exponential(-x)); }

FASTDIFF_ALWAYS F32 gelu(F32 x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }

// 0.5 * x * (1 + tanh(y)) is x * sigmoid(2 * y), y = sqrt(2 / pi) * (x + 0.044715 * x^3)
FASTDIFF_ALWAYS F32 gelu_tanh(F32 x) {
  const F32 y = x * (x * x * 0.071354816f + 1.5957691f);
  return x / (1.0f + exponential(-y));
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
