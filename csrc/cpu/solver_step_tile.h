// The arithmetic of a solver step on a run of elements whose operands are all contiguous: the inner loop of solver_step.
#pragma once
#include "cpu/fetch.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

constexpr int kVectors = 4;  // per tile: enough to hide the latency of an addition

template <class T>
struct Term {
  const T* k;
  int64_t k_step;  // 0: one coefficient for all elements
  const void* v;
  int type;
};

template <class T>
struct Field {
  const T* k;
  int64_t k_step;
};

// A run of elements whose operands are all contiguous.
template <class T>
struct Segment {
  Term<T> predict[6], first, rest[8];
  int predicts, rests;
  bool has_first;
  Field<T> low, high, next_h, next_raw, next_one, scale;  // k is null when not used
  const T* x;
  T *out, *out_x, *out_h;  // out_x, out_h may be null
  void* out_input;
  int input_type;
  int64_t copies, copy_stride;
  bool past_x, past_h, past_input;  // store past the caches
};

template <class T>
using VectorT = typename VectorOf<T>::V;

FASTDIFF_ALWAYS F32 load_term(const float*, const void* v, int64_t i, int type) { return load_float(at(v, i, type), type); }
FASTDIFF_ALWAYS F64 load_term(const double*, const void* v, int64_t i, int) { return load<F64>((const double*)v + i); }

template <class T>
FASTDIFF_ALWAYS VectorT<T> load_field(const Field<T>& f, int64_t i) {
  return f.k_step ? load<VectorT<T>>(f.k + i) : VectorT<T>{} + *f.k;
}

template <class T>
FASTDIFF_ALWAYS void accumulate(VectorT<T> (&sum)[kVectors], const Term<T>& t, int64_t i) {
  using V = VectorT<T>;
  constexpr int lanes = kBytes / sizeof(T);
  if (t.k_step == 0 && t.type == kTypeOf<T>) {
    const V k = V{} + *t.k;
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u) sum[u] = sum[u] + k * load<V>((const T*)t.v + i + u * lanes);
  } else {
    const Field<T> k{t.k, t.k_step};
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u)
      sum[u] = sum[u] + load_field(k, i + u * lanes) * load_term(t.k, t.v, i + u * lanes, t.type);
  }
}

// torch.maximum and torch.minimum: a NaN on either side stays
template <class V>
FASTDIFF_ALWAYS V clamp(V value, V low, V high) {
  V above = value > low ? value : low;
  above = value != value ? value : above;
  const V below = above < high ? above : high;
  return above != above ? above : below;
}

template <class T>
FASTDIFF_ALWAYS void put(T* to, VectorT<T> value, bool past) {
  if (past) return store_past(to, value);
  store(to, value);
}

// out of line: seldom used, and it needs its value in memory
static __attribute__((noinline)) void put_float64(double* to, const float* value) {
  for (int l = 0; l < kFloats; ++l) to[l] = double(value[l]);
}

FASTDIFF_ALWAYS void put_input(void* to, F32 value, int64_t i, int type, bool past) {
  if (past) return store_past((float*)to + i, value);
  if (type != kFloat64) return store_float((char*)to + i * size_of(type), value, type);
  float part[kFloats];
  store(part, value);
  put_float64((double*)to + i, part);
}
FASTDIFF_ALWAYS void put_input(void* to, F64 value, int64_t i, int type, bool past) {
  constexpr int lanes = kBytes / 8;
  if (type == kFloat64) return put((double*)to + i, value, past);
  double wide[lanes];
  float narrow[kFloats] = {};
  char part[kBytes];
  store(wide, value);
  for (int l = 0; l < lanes; ++l) narrow[l] = float(wide[l]);
  store_float(part, load<F32>(narrow), type);
  memcpy((char*)to + i * size_of(type), part, size_t(lanes * size_of(type)));
}

template <class T>
FASTDIFF_ALWAYS void run_tile(const Segment<T>& s, int64_t i) {
  using V = VectorT<T>;
  constexpr int lanes = kBytes / sizeof(T);
  V raw[kVectors] = {}, next[kVectors] = {}, h[kVectors];
  for (int t = 0; t < s.predicts; ++t) accumulate(raw, s.predict[t], i);
  FASTDIFF_UNROLL
  for (int u = 0; u < kVectors; ++u) h[u] = raw[u];
  if (s.low.k)
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u)
      h[u] = clamp(raw[u], load_field(s.low, i + u * lanes), load_field(s.high, i + u * lanes));
  if (s.has_first) accumulate(next, s.first, i);
  if (s.next_h.k)
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u) next[u] = next[u] + load_field(s.next_h, i + u * lanes) * h[u];
  if (s.next_raw.k)
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u) next[u] = next[u] + load_field(s.next_raw, i + u * lanes) * raw[u];
  for (int t = 0; t < s.rests; ++t) accumulate(next, s.rest[t], i);
  if (s.next_one.k)
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u) next[u] = next[u] + load_field(s.next_one, i + u * lanes);
  if (s.out_x)
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u) put(s.out_x + i + u * lanes, load<V>(s.x + i + u * lanes), s.past_x);
  if (s.out_h)
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u) put(s.out_h + i + u * lanes, h[u], s.past_h);
  FASTDIFF_UNROLL
  for (int u = 0; u < kVectors; ++u) store(s.out + i + u * lanes, next[u]);
  if (!s.scale.k) return;
  FASTDIFF_UNROLL
  for (int u = 0; u < kVectors; ++u) next[u] = load_field(s.scale, i + u * lanes) * next[u];
  for (int64_t g = 0; g < s.copies; ++g)
    FASTDIFF_UNROLL
    for (int u = 0; u < kVectors; ++u)
      put_input((char*)s.out_input + g * s.copy_stride, next[u], i + u * lanes, s.input_type, s.past_input);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
