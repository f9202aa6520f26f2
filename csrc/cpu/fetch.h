// Brings elements of any type and strides into a contiguous buffer of float or double.
#pragma once
#include "cpu/simd.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

// One sample of a tensor seen as [channels, elements]; strides in elements.
struct Plane {
  const void* data;
  int64_t stride_c, stride_e;
  int type;
};

FASTDIFF_ALWAYS const char* at(const void* data, int64_t index, int type) {
  return (const char*)data + index * size_of(type);
}

template <class T>
constexpr int kTypeOf = sizeof(T) == 8 ? kFloat64 : kFloat32;

// Whether elements [0, channels * elements) lie one after another.
FASTDIFF_ALWAYS bool is_flat(const Plane& p, int64_t channels, int64_t elements) {
  return (p.stride_e == 1 || elements == 1) && (channels == 1 || p.stride_c == elements);
}

FASTDIFF_ALWAYS void widen_float(float* to, const void* from, int64_t n, int type) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) store(to + i, load_float(at(from, i, type), type));
  if (i == n) return;
  float rest[kFloats] = {};
  memcpy(rest, at(from, i, type), size_t((n - i) * size_of(type)));
  store(rest, load_float(rest, type));
  memcpy(to + i, rest, size_t(n - i) * sizeof(float));
}

// n contiguous elements of any type
FASTDIFF_ALWAYS void widen(float* to, const void* from, int64_t n, int type) {
  if (type != kFloat64) return widen_float(to, from, n, type);
  for (int64_t i = 0; i < n; ++i) to[i] = float(((const double*)from)[i]);
}

FASTDIFF_ALWAYS void widen(double* to, const void* from, int64_t n, int type) {
  if (type == kFloat64) {
    memcpy(to, from, size_t(n) * sizeof(double));
    return;
  }
  float part[256];
  for (int64_t i = 0; i < n; i += 256) {
    const int64_t count = n - i < 256 ? n - i : 256;
    widen_float(part, at(from, i, type), count, type);
    for (int64_t k = 0; k < count; ++k) to[i + k] = double(part[k]);
  }
}

template <class Raw>
FASTDIFF_ALWAYS void gather(void* to, const void* from, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) ((Raw*)to)[i] = ((const Raw*)from)[i * stride];
}

template <class T>
FASTDIFF_ALWAYS void fetch_run(T* to, const char* from, int64_t stride, int64_t n, int type) {
  if (stride == 1) return widen(to, from, n, type);
  uint64_t part[128];
  for (int64_t i = 0; i < n; i += 128) {
    const int64_t count = n - i < 128 ? n - i : 128;
    const char* start = at(from, i * stride, type);
    if (type == kFloat64) {
      gather<uint64_t>(part, start, stride, count);
    } else if (type == kFloat32) {
      gather<uint32_t>(part, start, stride, count);
    } else {
      gather<uint16_t>(part, start, stride, count);
    }
    widen(to + i, part, count, type);
  }
}

// Elements [first, first + n) of a sample, counted channel by channel. A plain function: it is big and used often.
template <class T>
static __attribute__((noinline)) void fetch(T* to, const Plane& p, int64_t first, int64_t n, int64_t elements) {
  int64_t c = first / elements, e = first % elements;
  while (n > 0) {
    const int64_t run = n < elements - e ? n : elements - e;
    fetch_run(to, at(p.data, c * p.stride_c + e * p.stride_e, p.type), p.stride_e, run, p.type);
    to += run;
    n -= run;
    e = 0;
    ++c;
  }
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
