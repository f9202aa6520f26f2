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

#if defined(__AVX512F__)
// max(v, 0) - gelu(v) as a function of |v|: cubic[k][i] are the coefficients of |v|^k around i / 4, fitted (minimax) to
// 2e-6, between 3.6 and `top` to 1e-5.
struct alignas(64) QuickGelu {
  float cubic[4][16], top;
  float whole = 3145728.0f, last = 3145731.75f;  // 1.5 * 2^21, whose last bit is 1/4, and 15 quarters more
};

static const QuickGelu kQuickGelu = {
    {{0.0f, -0.00017704135f, -0.0025589857f, -0.0066834562f, 6.6462941e-05f, 0.041243106f, 0.13509992f, 0.27574733f,
      0.42886156f, 0.54804784f, 0.59827888f, 0.56820941f, 0.47920021f, 0.36195296f, 0.24686933f, 0.064994223f},
     {0.50000453f, 0.50330555f, 0.522183f, 0.54278457f, 0.52109611f, 0.41268086f, 0.20860112f, -0.05125764f,
      -0.29715544f, -0.46659282f, -0.53098571f, -0.4971849f, -0.40453506f, -0.29193404f, -0.18947151f, -0.043331701f},
     {-0.39953899f, -0.42101982f, -0.47182533f, -0.50630784f, -0.48311055f, -0.38778594f, -0.23967242f, -0.079478994f,
      0.05225157f, 0.13258657f, 0.16011064f, 0.14744438f, 0.11528838f, 0.079232588f, 0.04881721f, 0.0096407048f},
     {0.012524853f, 0.063107967f, 0.10953249f, 0.12886177f, 0.12060384f, 0.092612922f, 0.056732818f, 0.023783064f,
      0.0002429804f, -0.012460093f, -0.016382843f, -0.014800531f, -0.011079291f, -0.007229825f, -0.0042196088f,
      -0.0007155519f}},
    4.75f};

static const QuickGelu kQuickGeluTanh = {
    {{0.0f, -0.00017758073f, -0.0025514378f, -0.0065629822f, 0.00046394125f, 0.04153166f, 0.13380833f, 0.27144548f,
      0.42274702f, 0.54472047f, 0.60199028f, 0.58114058f, 0.4953326f, 0.37385288f, 0.24990101f, 0.066501558f},
     {0.50000453f, 0.50331628f, 0.52214009f, 0.54221404f, 0.5195666f, 0.41139901f, 0.21072447f, -0.043569401f,
      -0.2865029f, -0.45980707f, -0.53311998f, -0.50993735f, -0.42068446f, -0.30405906f, -0.19371815f, -0.045643065f},
     {-0.39954188f, -0.42109793f, -0.47178811f, -0.50544441f, -0.48113701f, -0.38599488f, -0.24033025f, -0.083569162f,
      0.046545155f, 0.12866871f, 0.15996198f, 0.15137367f, 0.12041927f, 0.08308778f, 0.050338876f, 0.010456269f},
     {0.012586134f, 0.063362017f, 0.10970708f, 0.12860268f, 0.1199151f, 0.091967173f, 0.056674819f, 0.024431398f,
      0.001185124f, -0.011793769f, -0.016247572f, -0.015187532f, -0.011607976f, -0.0076236925f, -0.0043830345f,
      -0.00079942058f}},
    4.5f};

// For results of 8 bits or so: error below 1e-5, above -3 below 3e-5 of the result. Only its three products and sums run
// where a matrix product's do (Zen 4).
FASTDIFF_ALWAYS F32 quick_gelu(F32 v, const QuickGelu* table) {
  asm("" : "+r"(table));  // operands in memory: a tile of sums leaves no registers for tables
  const F32 a = (F32)_mm512_range_ps((__m512)v, _mm512_set1_ps(table->top), 0xa);  // the least magnitude
  const I32 i = (I32)_mm512_min_ps(_mm512_set1_ps(table->last), (__m512)(a + table->whole));
  const auto c = [&](int k) { return (F32)_mm512_permutexvar_ps((__m512i)i, (__m512)load<F32>(table->cubic[k])); };
  return at_least(v, 0.0f) - multiply_add(multiply_add(multiply_add(c(3), a, c(2)), a, c(1)), a, c(0));
}
#endif

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
