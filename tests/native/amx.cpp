// Runs the AMX code of linear layers on the tiles of amx_emulated.h, against plain loops. Compiled by test_linear.py with
// FASTDIFF_AMX_EMULATED, FASTDIFF_ISA=amx and the AVX512 flags. Prints the number of layers.
#include "cpu/linear.cpp"
#include "cpu/linear_w8a16.cpp"
#include "cpu/linear_w8a8.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

using namespace fastdiff;

static std::mt19937 generator(0);

static float brain(float v) {  // rounds to bfloat16 by cutting: what counts is that both sides multiply the same numbers
  uint32_t bits;
  memcpy(&bits, &v, 4);
  bits &= 0xffff0000u;
  memcpy(&v, &bits, 4);
  return v;
}

// columns in panels of 16, g consecutive k together
template <class T>
static std::vector<T> packed(const std::vector<T>& w, int64_t N, int64_t K, int64_t g) {
  const int64_t panels = (N + 15) / 16, steps = (K + g - 1) / g;
  std::vector<T> out(size_t(panels * steps * 16 * g));
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) out[size_t(((n / 16 * steps + k / g) * 16 + n % 16) * g + k % g)] = w[size_t(n * K + k)];
  return out;
}

static bool layer(int64_t M, int64_t K, int64_t N, bool codes, bool narrow) {
  std::vector<float> x(size_t(M * K)), out(size_t(M * N)), scale(size_t(N), 1.0f), wide;
  std::vector<int8_t> x8(x.size()), w(size_t(N * K));
  std::vector<int32_t> sum(static_cast<size_t>(N));
  for (size_t i = 0; i < x.size(); ++i) x8[i] = int8_t(int(generator() % 255) - 127), x[i] = brain(float(x8[i]) / 64);
  for (size_t i = 0; i < w.size(); ++i) w[i] = int8_t(int(generator() % 255) - 127);
  for (size_t i = 0; i < w.size(); ++i) sum[i / size_t(K)] += w[i];
  std::vector<uint16_t> half, x16;
  for (int8_t v : w) {
    float f = float(v);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    half.push_back(uint16_t(bits >> 16));
  }
  for (float f : x) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    x16.push_back(uint16_t(bits >> 16));
  }
  const auto p8 = packed(w, N, K, 4);
  const auto p16 = packed(half, N, K, 2);
  const float one = 1.0f;
  Linear a{};
  a.rows = M, a.inner = K, a.x_stride = K, a.panels = (N + 15) / 16, a.sums = N, a.weight_sum = codes ? sum.data() : nullptr;
  a.x = codes ? (const void*)x8.data() : x16.data();
  a.x_type = codes ? kInt8 : kBFloat16;
  a.x_scale = codes ? &one : nullptr;
  a.weight = codes || narrow ? (const void*)p8.data() : p16.data();
  a.weight_type = codes || narrow ? kInt8 : kBFloat16;
  a.epilogue.columns = N, a.epilogue.column_scale = scale.data();
  a.epilogue.out = out.data(), a.epilogue.out_stride = N, a.epilogue.out_type = kFloat32;
  codes ? amx::linear_w8a8(a) : narrow ? amx::linear_w8a16(a) : amx::linear(a);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double wanted = 0, size = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double left = codes ? x8[size_t(m * K + k)] : x[size_t(m * K + k)], term = left * w[size_t(n * K + k)];
        wanted += term, size += std::abs(term);
      }
      const double error = std::abs(out[size_t(m * N + n)] - wanted), allowed = codes ? 0 : 1e-6 * size;
      if (error > allowed) return fprintf(stderr, "%ld %ld %ld: %g is wrong by %g\n", long(M), long(K), long(N), wanted, error), false;
    }
  return true;
}

int main() {
  int done = 0;
  for (int64_t M : {1, 2, 5, 15, 16, 17, 40})
    for (int64_t K : {1, 4, 63, 64, 65, 130, 260})
      for (int64_t N : {1, 16, 33, 64})
        for (int kind = 0; kind < 3; ++kind, ++done)
          if (!layer(M, K, N, kind == 0, kind == 2)) return 1;
  printf("%d\n", done);
}
