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
// max(v, 0) - gelu(v) as a function of a = |v|: cubic[k][i] are the coefficients of a^k in cell i, fitted (minimax). The
// first 16 cells are 1/8 wide, those from 2 on 1/4: as the leading bits of a + 2 count them. 0 from `top` on.
struct alignas(64) QuickGelu {
  float cubic[4][32], top = 5.5f, first = 2.0f;
};

static const QuickGelu kQuickGelu = {
    {{0.0f, -6.920927e-5f, -0.00052198244f, -0.0017493005f, -0.0038273411f, -0.006117839f, -0.0070175817f,
      -0.0039704316f, 0.0061989957f, 0.026703725f, 0.060067255f, 0.10743626f, 0.16809931f, 0.23933414f,
      0.31662968f, 0.39424232f, 0.49571788f, 0.5828585f, 0.59210694f, 0.5294278f, 0.42200342f, 0.30263412f,
      0.19660908f, 0.116328575f, 0.062949665f, 0.03126052f, 0.01428563f, 0.0060214936f, 0.0023455874f,
      0.0008457745f, 0.0f, 0.0f},
     {0.50002366f, 0.50157475f, 0.50692993f, 0.51672554f, 0.5292344f, 0.5403314f, 0.5440834f, 0.5338198f,
      0.5035036f, 0.44900054f, 0.36906803f, 0.26580667f, 0.14451216f, 0.012976264f, -0.1196055f, -0.24389839f,
      -0.39463007f, -0.5119137f, -0.52381355f, -0.45583785f, -0.34848365f, -0.23817539f, -0.14711292f,
      -0.08272116f, -0.042566516f, -0.020123757f, -0.0087671885f, -0.0035283729f, -0.0013143369f, -0.00045390285f,
      0.0f, 0.0f},
     {-0.40009183f, -0.4121451f, -0.43347535f, -0.45965686f, -0.48482156f, -0.5027711f, -0.5079839f, -0.49645448f,
      -0.46631095f, -0.41799572f, -0.35413522f, -0.2790752f, -0.19820993f, -0.117229186f, -0.041409157f,
      0.024952766f, 0.09960866f, 0.15224975f, 0.15733318f, 0.13275273f, 0.096981265f, 0.062994644f, 0.0369187f,
      0.019699711f, 0.009629262f, 0.004330427f, 0.0017975242f, 0.000690406f, 0.00024585155f, 8.129556e-5f, 0.0f,
      0.0f},
     {0.015900139f, 0.04850512f, 0.0771217f, 0.100555494f, 0.117473945f, 0.12716681f, 0.12957984f, 0.1252604f,
      0.11526363f, 0.10097981f, 0.08396609f, 0.06577298f, 0.04779723f, 0.031174412f, 0.016718192f, 0.0049054627f,
      -0.0074239653f, -0.015303099f, -0.016024405f, -0.013060714f, -0.009086454f, -0.0055951145f, -0.0031056278f,
      -0.0015705104f, -0.0007285176f, -0.0003114346f, -0.00012310408f, -4.5106783e-5f, -1.5350071e-5f,
      -4.858875e-6f, 0.0f, 0.0f}}};

static const QuickGelu kQuickGeluTanh = {
    {{0.0f, -6.9482194e-5f, -0.0005231032f, -0.001747896f, -0.0038068497f, -0.0060406593f, -0.0068302113f,
      -0.0036336547f, 0.006657543f, 0.027128354f, 0.06014076f, 0.106710546f, 0.166108f, 0.2357721f, 0.3115465f,
      0.38817582f, 0.4902845f, 0.5830129f, 0.6011264f, 0.54486f, 0.43687916f, 0.31036392f, 0.19509582f,
      0.10819346f, 0.052726492f, 0.022480292f, 0.008345747f, 0.0026845625f, 0.0007444104f, 0.00017701532f, 0.0f,
      0.0f},
     {0.5000238f, 0.50158113f, 0.5069469f, 0.5167237f, 0.52912015f, 0.5399472f, 0.5432594f, 0.5324827f, 0.5017977f,
      0.44737965f, 0.36828342f, 0.26676032f, 0.14799409f, 0.019358872f, -0.11061035f, -0.23332185f, -0.38496f,
      -0.50964475f, -0.5321925f, -0.4712652f, -0.36340693f, -0.24652387f, -0.14752935f, -0.07781807f,
      -0.036079466f, -0.01464741f, -0.005184138f, -0.0015919824f, -0.00042205042f, -9.609269e-5f, 0.0f, 0.0f},
     {-0.4000974f, -0.4122006f, -0.43357554f, -0.45971033f, -0.48465383f, -0.5021741f, -0.5068011f, -0.49468386f,
      -0.4641678f, -0.4159234f, -0.35272706f, -0.27892765f, -0.19974643f, -0.120551705f, -0.04622767f,
      0.019286394f, 0.0943744f, 0.1502846f, 0.15963288f, 0.1376355f, 0.101713434f, 0.06570993f, 0.037364524f,
      0.018720856f, 0.008249866f, 0.0031870266f, 0.0010748493f, 0.00031500263f, 7.982141e-5f, 1.7397773e-5f, 0.0f,
      0.0f},
     {0.01597768f, 0.048721228f, 0.07740115f, 0.10079636f, 0.11756938f, 0.12703429f, 0.12918699f, 0.12464287f,
      0.11452064f, 0.100256376f, 0.08341855f, 0.06553028f, 0.047928542f, 0.031672377f, 0.017501762f, 0.005840582f,
      -0.006557429f, -0.014918104f, -0.016209044f, -0.013560985f, -0.009571927f, -0.005874308f, -0.0031683357f,
      -0.0015060102f, -0.0006302539f, -0.00023154025f, -7.437793e-5f, -2.0795902e-5f, -5.0357166e-6f,
      -1.0505321e-6f, 0.0f, 0.0f}}};

// For results of 8 bits or so: error below 5e-7, above -3 below 5e-5 of the result. Only its three products and sums run
// where a matrix product's do (Zen 4).
FASTDIFF_ALWAYS F32 quick_gelu(F32 v, const QuickGelu* table) {
  asm("" : "+r"(table));  // operands in memory: a tile of sums leaves no registers for tables
  const F32 a = (F32)_mm512_range_ps((__m512)v, _mm512_set1_ps(table->top), 0xa);  // the least magnitude
  const __m512i i = _mm512_srli_epi32((__m512i)(a + table->first), 19);
  const auto c = [&](int k) {
    const float* row = table->cubic[k];
    return (F32)_mm512_permutex2var_ps((__m512)load<F32>(row), i, (__m512)load<F32>(row + 16));
  };
  return at_least(v, 0.0f) - multiply_add(multiply_add(multiply_add(c(3), a, c(2)), a, c(1)), a, c(0));
}
#endif

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
