// The tile intrinsics that tile_amx.h uses, in plain C++: for machines without AMX.
#pragma once
#include <stdint.h>
#include <string.h>

namespace amx_emulated {

struct State {
  uint16_t row_bytes[8];
  uint8_t rows[8];
  alignas(64) unsigned char data[8][16][64];
};
static thread_local State state;

static inline void configure(const void* from) {
  memset(&state, 0, sizeof(state));
  memcpy(state.row_bytes, (const char*)from + 16, sizeof(state.row_bytes));
  memcpy(state.rows, (const char*)from + 48, sizeof(state.rows));
}

static inline void load(int t, const void* from, long stride) {
  memset(state.data[t], 0, sizeof(state.data[t]));
  for (int r = 0; r < state.rows[t]; ++r) memcpy(state.data[t][r], (const char*)from + r * stride, state.row_bytes[t]);
}

static inline void keep(int t, void* to, long stride) {
  for (int r = 0; r < state.rows[t]; ++r) memcpy((char*)to + r * stride, state.data[t][r], state.row_bytes[t]);
}

template <class Sum, class Dot>
static inline void multiply(int c, int a, int b, Dot dot) {
  if (state.rows[b] * 4 != state.row_bytes[a] || state.rows[c] != state.rows[a]) __builtin_trap();  // a #UD
  for (int r = 0; r < state.rows[c]; ++r)
    for (int k = 0; k < state.rows[b]; ++k)
      for (int n = 0; n < state.row_bytes[c] / 4; ++n) {
        Sum sum;
        memcpy(&sum, state.data[c][r] + 4 * n, 4);
        sum += dot(state.data[a][r] + 4 * k, state.data[b][k] + 4 * n);
        memcpy(state.data[c][r] + 4 * n, &sum, 4);
      }
}

static inline int32_t dot_codes(const unsigned char* a, const unsigned char* b) {
  int32_t sum = 0;
  for (int i = 0; i < 4; ++i) sum += int32_t(a[i]) * int32_t(int8_t(b[i]));
  return sum;
}

static inline float dot_brains(const unsigned char* a, const unsigned char* b) {
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    const unsigned char left[4] = {0, 0, a[2 * i], a[2 * i + 1]}, right[4] = {0, 0, b[2 * i], b[2 * i + 1]};
    float x, y;
    memcpy(&x, left, 4);
    memcpy(&y, right, 4);
    sum += x * y;
  }
  return sum;
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_release
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) amx_emulated::configure(from)
#define _tile_loadd(t, from, stride) amx_emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) amx_emulated::keep(t, to, stride)
#define _tile_release()
#define _tile_dpbusd(c, a, b) amx_emulated::multiply<int32_t>(c, a, b, amx_emulated::dot_codes)
#define _tile_dpbf16ps(c, a, b) amx_emulated::multiply<float>(c, a, b, amx_emulated::dot_brains)
