#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastdiff {

constexpr int kMaxOutputs = 4, kMaxSlots = 5, kCoefColumns = 21, kMetaColumns = 6;

// The arguments of fastdiff/ops/solver_step.py. Tensors of the state's shape are seen as [batch, channels, elements].
struct SolverStep {
  struct Output {
    const void* data;
    int64_t stride[3];
    int type;
  };
  void *x, *history, *model_input;
  int32_t* tick;
  const void *aux, *coef;  // aux may be null
  const int32_t *meta, *rows;
  const int64_t* seed;
  const int32_t* source;  // may be null
  int64_t batch, channels, elements, slots, copies;
  int64_t coef_stride[4];  // row, column, channel, element
  int state_type, input_type, outputs;
  Output output[kMaxOutputs];
  uint32_t* active;  // [batch] scratch: which columns matter to each sample
};

FASTDIFF_KERNEL(solver_step, (const SolverStep& step), step)

}  // namespace fastdiff
