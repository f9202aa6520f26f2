#pragma once
#include "cuda/launch.h"

namespace fastdiff {

constexpr int kMaxOutputs = 4, kMaxSlots = 5, kCoefColumns = 21, kMetaColumns = 6;

// columns of `coef`, as COEF in the contract
enum : int { kPredX, kPredM, kPredU = 5, kLow, kHigh, kNextX, kNextH, kNextRaw, kNextSlot, kNextNoise = 16,
             kNextU = 18, kNextOne, kScale };

// The arguments of fastdiff/ops/solver_step.py. Tensors of the state's shape are seen as [batch, channels, elements].
struct SolverStep {
  struct Output {
    const void* data;
    int64_t rows, stride[3];
    int type;
    bool flat;  // found by `prepare`: four elements can be read at once
  };
  void *x, *history, *model_input;
  int32_t* tick;
  uint32_t* ticket;  // zero before and after; nobody else's while the kernel runs
  const void *aux, *coef;  // aux may be null
  const int32_t *meta, *rows;
  const int64_t* seed;
  const int32_t* source;  // may be null
  int64_t batch, channels, elements, slots, copies, lines, table_rows;
  int64_t coef_stride[4];  // row, column, channel, element; 0 for an extent of 1
  int state_type, input_type, outputs;
  Output output[kMaxOutputs];

  uint32_t absent;  // found by `prepare`: columns whose operand does not exist
  bool flat;        // found by `prepare`: the state can be read four elements at a time, coefficients are per row
  bool field;       // found by `prepare`: coefficients differ within a sample
};

void solver_step_cuda(SolverStep step, Queue queue);

}  // namespace fastdiff
