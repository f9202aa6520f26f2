#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

// out = a + 0.5 b on n floats, n a multiple of 64 and all addresses of 64, with stores past the caches: the traffic that
// memory-bound kernels are measured against (McCalpin's STREAM triad).
FASTDIFF_KERNEL(stream_triad, (float* out, const float* a, const float* b, int64_t n), out, a, b, n)

}  // namespace fastdiff
