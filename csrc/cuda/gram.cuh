// What one thread adds up for `gram`, for GPU threads and for the CPU, where the tests run it.
#pragma once
#include "cuda/element.cuh"
#include "cuda/launch.h"

namespace fastdiff {

constexpr int kGramThreads = 256, kGramTurns = 4, kMaxOperands = 8;
constexpr int64_t kGramBlock = 4 * kGramThreads, kGramChunk = kGramTurns * kGramBlock;

FASTDIFF_ANYWHERE constexpr int products(int count) { return count * (count + 1) / 2 + count; }  // pairs i <= j, then the sums

struct GramOperands {
  Operand v[kMaxOperands];
  bool flat;  // every sample is contiguous, can be read four elements at a time, and has a multiple of four
};

inline bool is_flat(const Operand& v, int64_t channels, int64_t elements) {
  const uintptr_t bytes = size_of_float(v.type) == 2 ? 8 : 16;
  return reinterpret_cast<uintptr_t>(v.data) % bytes == 0 && v.stride_b % 4 == 0 && channels * elements % 4 == 0 &&
         (elements == 1 || v.stride_e == 1) && (channels == 1 || v.stride_c == elements);
}

// Elements first .. first + 3 of sample b, zeros past the end.
template <class T>
FASTDIFF_INLINE void read_four(const Operand& v, bool flat, int64_t b, int64_t first, int64_t n, int64_t elements,
                               T (&out)[4]) {
  if (flat) {
    Raw<T> raw;
    if (first < n) load_raw(raw, v.data, b * v.stride_b + first, v.type);
    return decode(raw, v.type, out);
  }
  int64_t c = first / elements, e = first - c * elements;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = first + i < n ? load_one<T>(v.data, b * v.stride_b + c * v.stride_c + e * v.stride_e, v.type) : T(0);
    if (++e == elements) e = 0, ++c;
  }
}

// A thread's part of one chunk: its four neighbours of every turn, joined pairwise, turn after turn.
template <class T, int N>
FASTDIFF_INLINE void add_products(const GramOperands& operands, int64_t b, int64_t chunk, int thread, int64_t n,
                                  int64_t elements, T (&total)[products(N)]) {
#pragma unroll 1
  for (int turn = 0; turn < kGramTurns; ++turn) {
    const int64_t first = chunk * kGramChunk + turn * kGramBlock + thread * 4;
    T v[N][4];
#pragma unroll
    for (int i = 0; i < N; ++i) read_four<T>(operands.v[i], operands.flat, b, first, n, elements, v[i]);
    int k = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int j = i; j < N; ++j, ++k)
        total[k] += (v[i][0] * v[j][0] + v[i][1] * v[j][1]) + (v[i][2] * v[j][2] + v[i][3] * v[j][3]);
#pragma unroll
    for (int i = 0; i < N; ++i, ++k) total[k] += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
  }
}

}  // namespace fastdiff
