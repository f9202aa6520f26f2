#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

enum ActivateKind : int { kActivateGelu, kActivateGeluTanh, kActivateSilu };  // ACTIVATIONS in fastdiff/ops/activate.py

// out [rows, n] of x [rows, n] with a row stride, both of one type. `gated`: rows of x hold n values, then n gates, and
// the result is value * activation(gate).
struct Activate {
  const void* x;
  void* out;
  int type, kind;
  bool gated;
  int64_t rows, n, stride;
};

FASTDIFF_KERNEL(activate, (const Activate& task), task)

}  // namespace fastdiff
