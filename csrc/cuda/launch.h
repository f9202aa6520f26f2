// What cuda_bindings.cpp may call: plain C++, so that no host compiler needs the CUDA headers.
// Every launcher queues its work on `queue` (a cudaStream_t), never waits, and throws std::runtime_error.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastdiff {

struct Operand {
  const void* data;
  int type;
  int64_t stride_b, stride_c, stride_e;
};

// The arguments of `solver_step` as fastdiff/ops/solver_step.py names them.
struct SolverStep {
  void *x, *history, *model_input;
  int32_t* tick;
  const int32_t* source;
  const void *aux, *coef;
  const int32_t *meta, *rows;
  const int64_t* seed;
  int state_type, input_type;
  int64_t batch, channels, elements;
  int slots, copies, outputs;
  Operand output[4];
  int64_t coef_stride_r, coef_stride_k, coef_stride_c, coef_stride_e;
  int64_t coef_channels, coef_elements;  // 0, 0 where coefficients are per row
};

void philox_normal_cuda(float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows,
                        int64_t n, void* queue);
void solver_step_cuda(const SolverStep& step, void* queue);
int64_t gram_chunks(int64_t n);
void gram_cuda(double* out, double* partial, const std::vector<Operand>& operands, int64_t batch, int64_t channels,
               int64_t elements, void* queue);

// "" or a sentence that says why this process cannot run the kernels.
std::string unusable();

}  // namespace fastdiff
