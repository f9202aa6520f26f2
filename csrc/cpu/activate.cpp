#include "cpu/activate.h"

#include "cpu/functions.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int64_t kRun = 1 << 12;    // elements of a row that are one task
constexpr int64_t kAhead = 2 << 10;  // bytes that are fetched ahead of the arithmetic in rows that are long

template <int kType, int kKind>
FASTDIFF_ALWAYS F32 activation(F32 x) {
  if (kKind == kActivateGelu) return gelu_as<kType>(x);
  return kKind == kActivateGeluTanh ? gelu_tanh_as<kType>(x) : silu_as<kType>(x);
}

template <int kType, int kKind, bool kGated>
static void run(const Activate& t) {
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
      auto at = [&](int64_t i, auto part) {
        const F32 y = activation<kType, kKind>(fetch(gate + i * size_of(kType), kType, part));
        return kGated ? fetch(x + i * size_of(kType), kType, part) * y : y;
      };
      if (past) {
        for (int64_t i = 0; i < n; i += kFloats) {
          prefetch(gate + i * size_of(kType) + ahead);
          if (kGated) prefetch(x + i * size_of(kType) + ahead);
          put_past(out + i * size_of(kType), at(i, Whole()), kType);
        }
      } else {
        each_vector(n, [&](int64_t i, auto part) { put_result(out + i * size_of(kType), at(i, part), kType, part); });
      }
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
