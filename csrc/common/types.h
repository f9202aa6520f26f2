// The element types that contracts pass as numbers: fastdiff/ops/native.py has the same table.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTDIFF_ANYWHERE __host__ __device__
#else
#define FASTDIFF_ANYWHERE
#endif

namespace fastdiff {

enum Type : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3, kInt8 = 4 };

FASTDIFF_ANYWHERE constexpr int64_t size_of(int type) {
  return type == kFloat64 ? 8 : type == kFloat32 ? 4 : type == kInt8 ? 1 : 2;
}

// The same where int8 cannot come: its branch costs a GPU kernel registers.
FASTDIFF_ANYWHERE constexpr int64_t size_of_float(int type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

}  // namespace fastdiff
