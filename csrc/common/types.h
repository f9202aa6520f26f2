// The element types that contracts pass as numbers: fastdiff/ops/native.py has the same table.
#pragma once
#include <cstdint>

namespace fastdiff {

enum Type : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

constexpr int64_t size_of(int type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

}  // namespace fastdiff
