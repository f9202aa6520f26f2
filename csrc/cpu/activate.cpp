#include "cpu/activate.h"

#include "cpu/functions.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kRun = 1 << 12;    // elements of a row that are one task
constexpr int64_t kAhead = 2 << 10;  // bytes that are fetched ahead of the arithmetic in rows that are long

template <int kType, int kKind, class V>
FASTDIFF_ALWAYS V activation(const V& x) {
  if (kKind == kActivateGelu) return gelu_as<kType>(x);
  return kKind == kActivateGeluTanh ? gelu_tanh_as<kType>(x) : silu_as<kType>(x);
}

// Starts to bring in what a group reads that lies `ahead` bytes behind this one.
template <int kType, bool kGated, int N>
FASTDIFF_ALWAYS void fetch_ahead(const char* x, const char* gate, int64_t ahead) {
  for (int64_t line = 0; line < N * kFloats * size_of(kType); line += 64) {
    prefetch(gate + line + ahead);
    if (kGated) prefetch(x + line + ahead);
  }
}

template <int kType, int kKind, bool kGated>
static void run(const Activate& t) {
  // float32 values and gates wait for memory, which is faster line by line (geglu 40 -> 42 GB/s, Zen 4)
  constexpr int N = kGated && kType == kFloat32 ? 1 : kGroup;
  const int64_t chunks = (t.n + kRun - 1) / kRun, total = t.rows * t.n;
  const bool past = total * size_of(kType) >= kPastCaches && (uintptr_t)t.out % kBytes == 0 && t.n % kFloats == 0;
  // of rows of two streams, the next row: what lies behind the values are their gates
  const int64_t ahead = kGated && chunks == 1 ? t.stride * size_of(kType) : kAhead;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / chunks, first = task % chunks * kRun, n = t.n - first < kRun ? t.n - first : kRun;
      const char* x = element(t.x, row * t.stride + first, kType);
      const char* gate = x + (kGated ? t.n : 0) * size_of(kType);
      char* out = element(t.out, row * t.n + first, kType);
      auto value = [&](int64_t i, auto part) { return fetch(x + i * size_of(kType), kType, part); };
      auto through = [&](int64_t i, auto part) { return fetch(gate + i * size_of(kType), kType, part); };
      int64_t i = 0;
      for (; i + N * kFloats <= n; i += N * kFloats) {
        if (past) fetch_ahead<kType, kGated, N>(x + i * size_of(kType), gate + i * size_of(kType), ahead);
        Group<N> y = group<N>([&](int k) { return through(i + k * kFloats, Whole()); });
        y = activation<kType, kKind>(y);
        FASTDIFF_UNROLL
        for (int k = 0; k < N; ++k) {
          const int64_t at = i + k * kFloats;
          put_either(out + at * size_of(kType), kGated ? value(at, Whole()) * y.v[k] : y.v[k], kType, past, Whole());
        }
      }
      each_vector(n - i, [&](int64_t rest, auto part) {
        const F32 y = activation<kType, kKind>(through(i + rest, part));
        put_either(out + (i + rest) * size_of(kType), kGated ? value(i + rest, part) * y : y, kType, past, part);
      });
    }
    _mm_sfence();
  };
  parallel_for(t.rows * chunks, total < kSerial / 2, body);
}

template <int kType, int kKind>
FASTDIFF_ALWAYS void run_kind(const Activate& t) {
  t.gated ? run<kType, kKind, true>(t) : run<kType, kKind, false>(t);
}

void activate(const Activate& t) {
  with_float(t.type, [&](auto in) {
    constexpr int kType = decltype(in)::value;
    if (t.kind == kActivateGelu) return run_kind<kType, kActivateGelu>(t);
    if (t.kind == kActivateGeluTanh) return run_kind<kType, kActivateGeluTanh>(t);
    run_kind<kType, kActivateSilu>(t);
  });
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
