// What cuda_bindings.cpp may call: plain C++, so that no host compiler needs the CUDA headers.
// Every launcher queues its work, never waits, and throws std::runtime_error where it cannot launch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastdiff {

// Where a kernel goes: the index of a device and one of its streams.
struct Queue {
  int device;
  void* stream;
};

// A tensor seen as [batch, channels, elements]; strides in elements.
struct Operand {
  const void* data;
  int type;
  int64_t stride_b, stride_c, stride_e;
};

void philox_normal_cuda(float* out, const int64_t* seed, const int32_t* step, const int32_t* stream, int64_t rows,
                        int64_t n, Queue queue);

// chunks of n elements, each of which has one partial result
int64_t gram_chunks(int64_t n);
void gram_cuda(double* out, double* partial, const std::vector<Operand>& operands, int64_t batch, int64_t channels,
               int64_t elements, Queue queue);

// "" or a sentence that says why this process cannot run the kernels.
std::string unusable();

}  // namespace fastdiff
