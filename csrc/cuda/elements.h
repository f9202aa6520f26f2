// Reading and writing elements of any float type: one by one by type number, or 16 bytes at a time by type.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/types.h"

namespace fastdiff {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// rounds to nearest even; float64 becomes float32 on its way to 16 bits, as in torch
template <typename T, typename S>
__device__ __forceinline__ T narrow(S v) {
  if constexpr (sizeof(T) == 2 && sizeof(S) == 8) {
    return narrow<T>(float(v));
  } else if constexpr (sizeof(T) == 2) {
    T out;
    if constexpr (std::is_same_v<T, __half>) {
      out = __float2half_rn(v);
    } else {
      out = __float2bfloat16_rn(v);
    }
    return out;
  } else {
    return T(v);
  }
}

// Calls `use` with a null pointer of the type that the number stands for.
template <typename F>
__device__ __forceinline__ void with_type(int type, F use) {
  switch (type) {
    case kFloat32: use(static_cast<const float*>(nullptr)); break;
    case kFloat64: use(static_cast<const double*>(nullptr)); break;
    case kFloat16: use(static_cast<const __half*>(nullptr)); break;
    default: use(static_cast<const __nv_bfloat16*>(nullptr));
  }
}

template <typename S>
__device__ __forceinline__ S element(const void* data, int type, int64_t at) {
  switch (type) {
    case kFloat32: return S(static_cast<const float*>(data)[at]);
    case kFloat64: return S(static_cast<const double*>(data)[at]);
    case kFloat16: return S(widen(static_cast<const __half*>(data)[at]));
    default: return S(widen(static_cast<const __nv_bfloat16*>(data)[at]));
  }
}

template <typename S>
__device__ __forceinline__ void set_element(void* data, int type, int64_t at, S v) {
  switch (type) {
    case kFloat32: static_cast<float*>(data)[at] = narrow<float>(v); break;
    case kFloat64: static_cast<double*>(data)[at] = narrow<double>(v); break;
    case kFloat16: static_cast<__half*>(data)[at] = narrow<__half>(v); break;
    default: static_cast<__nv_bfloat16*>(data)[at] = narrow<__nv_bfloat16>(v);
  }
}

// V consecutive elements, moved in words of 16 bytes where there are as many.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
  T v[V];
};

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* p) {
  using Word = typename std::conditional<sizeof(T) * V >= 16, uint4, uint2>::type;
  constexpr int kWords = sizeof(T) * V / sizeof(Word);
  Vector<T, V> out;
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(&out)[i] = reinterpret_cast<const Word*>(p)[i];
  return out;
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, V>& value) {
  using Word = typename std::conditional<sizeof(T) * V >= 16, uint4, uint2>::type;
  constexpr int kWords = sizeof(T) * V / sizeof(Word);
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(p)[i] = reinterpret_cast<const Word*>(&value)[i];
}

}  // namespace fastdiff
