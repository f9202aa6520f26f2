// Elements of any type in memory, four at a time or one by one. T is float or double: what is computed in.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/philox.h"
#include "common/types.h"

namespace fastdiff {

FASTDIFF_INLINE const char* at(const void* data, int64_t index, int type) {
  return static_cast<const char*>(data) + index * size_of_float(type);
}
FASTDIFF_INLINE char* at(void* data, int64_t index, int type) { return static_cast<char*>(data) + index * size_of_float(type); }

FASTDIFF_INLINE float half_to_float(uint32_t bits) {
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}
FASTDIFF_INLINE float bfloat_to_float(uint32_t bits) { return Scalar::from_bits(int32_t(bits << 16)); }

// float64 rounds twice on its way to 16 bits, as in torch
template <class T>
FASTDIFF_INLINE uint16_t to_16_bits(T value, int type) {
  if (type == kFloat16) return static_cast<__half_raw>(__float2half_rn(float(value))).x;
  return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(float(value))).x;
}

template <class T>
FASTDIFF_INLINE T load_one(const void* data, int64_t index, int type) {
  const char* from = at(data, index, type);
  if (type == kFloat32) return T(*reinterpret_cast<const float*>(from));
  if (type == kFloat64) return T(*reinterpret_cast<const double*>(from));
  const uint32_t bits = *reinterpret_cast<const uint16_t*>(from);
  return T(type == kFloat16 ? half_to_float(bits) : bfloat_to_float(bits));
}

template <class T>
FASTDIFF_INLINE void store_one(void* data, int64_t index, int type, T value) {
  char* to = at(data, index, type);
  if (type == kFloat32) {
    *reinterpret_cast<float*>(to) = float(value);
  } else if (type == kFloat64) {
    *reinterpret_cast<double*>(to) = double(value);
  } else {
    *reinterpret_cast<uint16_t*>(to) = to_16_bits(value, type);
  }
}

FASTDIFF_INLINE void load_four(const float* from, float (&to)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
FASTDIFF_INLINE void load_four(const double* from, double (&to)[4]) {
  const double2 low = *reinterpret_cast<const double2*>(from), high = *reinterpret_cast<const double2*>(from + 2);
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}
// One instruction: a plain store of a vector may be split into its parts where the compiler rewrites a loop's addresses.
template <class V>
FASTDIFF_INLINE void store_vector(void* to, V value) {
#if defined(__CUDA_ARCH__)
  __stwb(static_cast<V*>(to), value);
#else
  *static_cast<V*>(to) = value;
#endif
}

FASTDIFF_INLINE void store_four(float* to, const float (&v)[4]) { store_vector(to, make_float4(v[0], v[1], v[2], v[3])); }
FASTDIFF_INLINE void store_four(double* to, const double (&v)[4]) {
  store_vector(to, make_double2(v[0], v[1]));
  store_vector(to + 2, make_double2(v[2], v[3]));
}

// Four elements one after another, starting at a multiple of their size (of 16 bytes for float64).
template <class T>
FASTDIFF_INLINE void store_four(void* data, int64_t index, int type, const T (&value)[4]) {
  char* to = at(data, index, type);
  if (type == kFloat32) {
    const float v[4] = {float(value[0]), float(value[1]), float(value[2]), float(value[3])};
    store_four(reinterpret_cast<float*>(to), v);
  } else if (type == kFloat64) {
    const double v[4] = {double(value[0]), double(value[1]), double(value[2]), double(value[3])};
    store_four(reinterpret_cast<double*>(to), v);
  } else {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = to_16_bits(value[i], type);
    store_vector(to, make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16));
  }
}

// Four elements as they came from memory: they are converted when they are needed, so that many loads are on their way
// together. Types that T cannot hold as they are (float64 in float) are converted at once.
template <class T>
struct Raw {
  T wide[4] = {};
  uint2 narrow = {0, 0};
};

template <class T>
FASTDIFF_INLINE void load_raw(Raw<T>& raw, const void* data, int64_t index, int type) {
  const char* from = at(data, index, type);
  if (type == kFloat32) {
    float v[4];
    load_four(reinterpret_cast<const float*>(from), v);
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.wide[i] = T(v[i]);
  } else if (type == kFloat64) {
    double v[4];
    load_four(reinterpret_cast<const double*>(from), v);
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.wide[i] = T(v[i]);
  } else {
    raw.narrow = *reinterpret_cast<const uint2*>(from);
  }
}

template <class T>
FASTDIFF_INLINE void decode(const Raw<T>& raw, int type, T (&to)[4]) {
  const uint32_t bits[4] = {raw.narrow.x & 0xFFFFu, raw.narrow.x >> 16, raw.narrow.y & 0xFFFFu, raw.narrow.y >> 16};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    to[i] = type == kFloat16 ? T(half_to_float(bits[i])) : type == kBFloat16 ? T(bfloat_to_float(bits[i])) : raw.wide[i];
}

}  // namespace fastdiff
