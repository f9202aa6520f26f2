// One solver step of four elements, for GPU threads and for the CPU, where the tests run it.
#pragma once
#include "cuda/element.cuh"
#include "cuda/solver_step.h"

namespace fastdiff {

inline void prepare(SolverStep& s) {
  const int64_t n = s.channels * s.elements;
  const auto aligned = [](const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % uintptr_t(bytes) == 0; };
  const auto step_bytes = [](int type) { return type == kFloat32 || type == kFloat64 ? 16 : 8; };
  s.field = s.coef_stride[2] != 0 || s.coef_stride[3] != 0;
  s.flat = !s.field && n % 4 == 0 && aligned(s.x, 16) && aligned(s.history, 16) && aligned(s.aux, 16) &&
           aligned(s.model_input, step_bytes(s.input_type));
  s.absent = s.aux ? 0u : 1u << kPredU | 1u << kNextU;
  for (int j = s.outputs; j < kMaxOutputs; ++j) s.absent |= 1u << (kPredM + j);
  for (int slot = int(s.slots); slot < kMaxSlots; ++slot) s.absent |= 1u << (kNextSlot + slot);
  for (int j = 0; j < s.outputs; ++j) {
    SolverStep::Output& m = s.output[j];
    m.flat = (m.stride[2] == 1 || s.elements == 1) && (m.stride[1] == s.elements || s.channels == 1) &&
             m.stride[0] % 4 == 0 && aligned(m.data, step_bytes(m.type));
  }
}

// What all elements of a sample share.
template <class T>
struct Head {
  T k[kCoefColumns];  // unless the coefficients are a field; 0 where the operand does not exist
  int64_t from[kMaxOutputs];
  uint32_t key[4];  // step and stream of both noises
  int32_t row, slot_h, slot_x;
  bool scale;  // whether model_input is written; found later when the coefficients are a field
};

// A row past the table, a slot past the history, a source past the outputs: -1, the sample stays as it is.
template <class T>
FASTDIFF_INLINE void read_indices(const SolverStep& s, int32_t row, int64_t b, Head<T>& head) {
  head.row = row;
  if (row < 0) return;
  const int32_t* meta = s.meta + int64_t(row) * kMetaColumns;
  head.slot_h = meta[0];
  head.slot_x = meta[1];
#pragma unroll
  for (int i = 0; i < 4; ++i) head.key[i] = uint32_t(meta[2 + i]);
  bool valid = head.slot_h < s.slots && head.slot_x < s.slots;
#pragma unroll
  for (int j = 0; j < kMaxOutputs; ++j) {
    if (j >= s.outputs) break;
    const int64_t from = s.source ? s.source[j * s.batch + b] : b;
    valid = valid && from >= 0 && from < s.output[j].rows;
    head.from[j] = from;
  }
  if (!valid) head.row = -1;
}

// Lanes 0 .. 31 of a warp, or a loop over them, each read a part.
template <class T>
FASTDIFF_INLINE void read_head(const SolverStep& s, int32_t line, int64_t b, int lane, Head<T>& head) {
  int32_t row = line >= 0 && line < s.lines ? s.rows[line * s.batch + b] : -1;
  if (row >= s.table_rows) row = -1;
  if (lane == 31) read_indices(s, row, b, head);
  if (lane >= kCoefColumns || row < 0 || s.field) return;
  const T k = static_cast<const T*>(s.coef)[row * s.coef_stride[0] + lane * s.coef_stride[1]];
  head.k[lane] = s.absent >> lane & 1 ? T(0) : k;
  if (lane == kScale) head.scale = k != T(0);
}

template <class T>
struct Operands {
  T x, m[kMaxOutputs], u, slot[kMaxSlots], z[2];  // anything where the coefficient is zero
};

template <class T>
FASTDIFF_INLINE void add(T& sum, T k, T value) {
  if (k != T(0)) sum = sum + k * value;
}

// torch.maximum and torch.minimum: a NaN on either side stays
template <class T>
FASTDIFF_INLINE T clamp(T value, T low, T high) {
  T above = value > low ? value : low;
  above = value != value ? value : above;
  const T below = above < high ? above : high;
  return above != above ? above : below;
}

// One element: the prediction h and the next state.
template <class T>
FASTDIFF_INLINE void step_element(const T* k, const Operands<T>& v, T& h, T& next) {
  T raw = T(0);
  next = T(0);
  add(raw, k[kPredX], v.x);
#pragma unroll
  for (int j = 0; j < kMaxOutputs; ++j) add(raw, k[kPredM + j], v.m[j]);
  add(raw, k[kPredU], v.u);
  h = clamp(raw, k[kLow], k[kHigh]);
  add(next, k[kNextX], v.x);
  add(next, k[kNextH], h);
  add(next, k[kNextRaw], raw);
#pragma unroll
  for (int slot = 0; slot < kMaxSlots; ++slot) add(next, k[kNextSlot + slot], v.slot[slot]);
#pragma unroll
  for (int i = 0; i < 2; ++i) add(next, k[kNextNoise + i], v.z[i]);
  add(next, k[kNextU], v.u);
  add(next, k[kNextOne], T(1));
}

template <class T>
FASTDIFF_INLINE void make_noise(const SolverStep& s, const Head<T>& head, int64_t b, int i, int64_t q, T (&z)[4]) {
  float normal[4];
  philox_normal4<Scalar>(uint64_t(s.seed[b]), head.key[2 * i], head.key[2 * i + 1], uint32_t(q), 0u, normal);
#pragma unroll
  for (int e = 0; e < 4; ++e) z[e] = T(normal[e]);
}

// Elements 4q .. 4q + 3 of output j, whatever its strides.
template <class T>
FASTDIFF_INLINE void load_output(const SolverStep& s, const Head<T>& head, int j, int64_t q, Raw<T>& raw) {
  const SolverStep::Output& m = s.output[j];
  const int64_t first = head.from[j] * m.stride[0];
  if (m.flat) return load_raw(raw, m.data, first + 4 * q, m.type);
  uint32_t c = uint32_t(4 * q) / uint32_t(s.elements), e = uint32_t(4 * q) - c * uint32_t(s.elements);
  uint32_t bits[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t index = first + c * m.stride[1] + e * m.stride[2];
    if (m.type == kFloat32 || m.type == kFloat64) {
      raw.wide[i] = load_one<T>(m.data, index, m.type);
    } else {
      bits[i] = static_cast<const uint16_t*>(m.data)[index];
    }
    if (++e == s.elements) e = 0, ++c;
  }
  raw.narrow = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}

// The flat path: elements 4q .. 4q + 3 of sample b, whose state is x.
template <class T>
FASTDIFF_INLINE void step_four(const SolverStep& s, const Head<T>& head, int64_t b, int64_t q, const T (&x)[4]) {
  const T* k = head.k;
  const int64_t n = s.channels * s.elements, at_x = b * n + 4 * q;
  Raw<T> raw[kMaxOutputs];
  T u[4] = {}, slot[kMaxSlots][4] = {}, z[2][4] = {}, m[kMaxOutputs][4], h[4], next[4];
#pragma unroll
  for (int j = 0; j < kMaxOutputs; ++j)
    if (k[kPredM + j] != T(0)) load_output(s, head, j, q, raw[j]);
#pragma unroll
  for (int i = 0; i < kMaxSlots; ++i)
    if (k[kNextSlot + i] != T(0)) load_four(static_cast<const T*>(s.history) + i * s.batch * n + at_x, slot[i]);
  if (k[kPredU] != T(0) || k[kNextU] != T(0)) load_four(static_cast<const T*>(s.aux) + at_x, u);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (k[kNextNoise + i] != T(0)) make_noise(s, head, b, i, q, z[i]);
#pragma unroll
  for (int j = 0; j < kMaxOutputs; ++j) decode(raw[j], s.output[j].type, m[j]);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    step_element(k,
                 Operands<T>{x[i],
                             {m[0][i], m[1][i], m[2][i], m[3][i]},
                             u[i],
                             {slot[0][i], slot[1][i], slot[2][i], slot[3][i], slot[4][i]},
                             {z[0][i], z[1][i]}},
                 h[i], next[i]);

  if (head.slot_x >= 0) store_four(static_cast<T*>(s.history) + head.slot_x * s.batch * n + at_x, x);
  if (head.slot_h >= 0) store_four(static_cast<T*>(s.history) + head.slot_h * s.batch * n + at_x, h);
  store_four(static_cast<T*>(s.x) + at_x, next);
  if (!head.scale) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) next[i] = k[kScale] * next[i];
  for (int64_t g = 0; g < s.copies; ++g) store_four(s.model_input, g * s.batch * n + at_x, s.input_type, next);
}

// The coefficients of one element.
template <class T>
FASTDIFF_INLINE T read_field(const SolverStep& s, int32_t row, int column, int64_t c, int64_t e) {
  if (s.absent >> column & 1) return T(0);
  const int64_t* stride = s.coef_stride;
  return static_cast<const T*>(s.coef)[row * stride[0] + column * stride[1] + c * stride[2] + e * stride[3]];
}

// The general path: what there is of elements 4q .. 4q + 3, one by one.
template <class T>
FASTDIFF_INLINE void step_each(const SolverStep& s, const Head<T>& head, int64_t b, int64_t q) {
  const int64_t n = s.channels * s.elements;
  const int count = n - 4 * q < 4 ? int(n - 4 * q) : 4;
  const uint32_t c0 = uint32_t(4 * q) / uint32_t(s.elements), e0 = uint32_t(4 * q) - c0 * uint32_t(s.elements);
  T z[2][4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (s.field || head.k[kNextNoise + i] != T(0)) make_noise(s, head, b, i, q, z[i]);
  uint32_t c = c0, e = e0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    T k[kCoefColumns];
#pragma unroll
    for (int column = 0; column < kCoefColumns; ++column)
      k[column] = s.field ? read_field<T>(s, head.row, column, c, e) : head.k[column];
    const int64_t at_x = b * n + 4 * q + i;
    T* x = static_cast<T*>(s.x) + at_x;
    T* history = static_cast<T*>(s.history) + at_x;
    Operands<T> v{};
    v.x = *x;
#pragma unroll
    for (int j = 0; j < kMaxOutputs; ++j) {
      const SolverStep::Output& m = s.output[j];
      if (k[kPredM + j] != T(0))
        v.m[j] = load_one<T>(m.data, head.from[j] * m.stride[0] + c * m.stride[1] + e * m.stride[2], m.type);
    }
#pragma unroll
    for (int slot = 0; slot < kMaxSlots; ++slot)
      if (k[kNextSlot + slot] != T(0)) v.slot[slot] = history[slot * s.batch * n];
    if (k[kPredU] != T(0) || k[kNextU] != T(0)) v.u = static_cast<const T*>(s.aux)[at_x];
#pragma unroll
    for (int noise = 0; noise < 2; ++noise)  // an index that is not constant would put z in memory
      v.z[noise] = i == 0 ? z[noise][0] : i == 1 ? z[noise][1] : i == 2 ? z[noise][2] : z[noise][3];
    T h, next;
    step_element(k, v, h, next);
    if (head.slot_x >= 0) history[head.slot_x * s.batch * n] = v.x;
    if (head.slot_h >= 0) history[head.slot_h * s.batch * n] = h;
    *x = next;
    next = k[kScale] * next;
    for (int64_t g = 0; head.scale && g < s.copies; ++g)
      store_one(s.model_input, g * s.batch * n + at_x, s.input_type, next);
    if (++e == s.elements) e = 0, ++c;
  }
}

// Whether a field's c_in is nonzero anywhere among its entries first, first + step, ...
template <class T>
FASTDIFF_INLINE bool any_scale(const SolverStep& s, int32_t row, int64_t first, int64_t step) {
  const int64_t channels = s.coef_stride[2] ? s.channels : 1, elements = s.coef_stride[3] ? s.elements : 1;
  for (int64_t i = first; i < channels * elements; i += step)
    if (read_field<T>(s, row, kScale, i / elements, i % elements) != T(0)) return true;
  return false;
}

}  // namespace fastdiff
