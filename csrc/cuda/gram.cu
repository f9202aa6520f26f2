// `gram`: contract in fastdiff/ops/gram.py. Two launches, no atomics; the work split depends on the size of a sample only,
// so neither the batch nor the GPU changes a sum.
#include "cuda/gram.cuh"

#include <algorithm>

#include "cuda/device.h"

namespace fastdiff {

namespace {

constexpr int kWarps = kGramThreads / 32;

// partial[b, product, chunk]
template <class T, int N>
__global__ void __launch_bounds__(kGramThreads)
    gram_kernel(const __grid_constant__ GramOperands operands, double* partial, int64_t batch, int64_t n, int64_t elements,
                int64_t chunks) {
  constexpr int kProducts = products(N);
  __shared__ T sums[kWarps][kProducts];
  const int64_t chunk = blockIdx.x;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    T total[kProducts] = {};
    add_products<T, N>(operands, b, chunk, int(threadIdx.x), n, elements, total);
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) total[k] += __shfl_down_sync(0xFFFFFFFFu, total[k], offset);
      if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][k] = total[k];
    }
    __syncthreads();
    if (threadIdx.x < kProducts) {
      double sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += double(sums[warp][threadIdx.x]);
      partial[(b * kProducts + threadIdx.x) * chunks + chunk] = sum;
    }
    __syncthreads();
  }
}

// A warp adds up the chunks of one entry of out, in float64.
__global__ void __launch_bounds__(32)
    gram_finish_kernel(const double* partial, double* out, int64_t batch, int N, int64_t chunks) {
  const int entry = int(blockIdx.x), i = entry / (N + 1), j = entry % (N + 1), pairs = N * (N + 1) / 2;
  const int low = i < j ? i : j, high = i < j ? j : i;
  const int k = j == N ? pairs + i : low * N - low * (low - 1) / 2 + high - low;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const double* source = partial + (b * (pairs + N) + k) * chunks;
    double sum = 0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += 32) sum += source[chunk];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
    if (threadIdx.x == 0) out[b * N * (N + 1) + entry] = sum;
  }
}

using Kernel = void (*)(GramOperands, double*, int64_t, int64_t, int64_t, int64_t);

template <class T>
Kernel kernel_for(size_t count) {
  static const Kernel kernels[] = {gram_kernel<T, 1>, gram_kernel<T, 2>, gram_kernel<T, 3>, gram_kernel<T, 4>,
                                   gram_kernel<T, 5>, gram_kernel<T, 6>, gram_kernel<T, 7>, gram_kernel<T, 8>};
  return kernels[count - 1];
}

}  // namespace

int64_t gram_chunks(int64_t n) { return std::max<int64_t>((n + kGramChunk - 1) / kGramChunk, 1); }

void gram_cuda(double* out, double* partial, const std::vector<Operand>& operands, int64_t batch, int64_t channels,
               int64_t elements, Queue queue) {
  if (batch == 0) return;
  const OnDevice device(queue.device);
  const int64_t n = channels * elements, chunks = gram_chunks(n);
  const size_t count = operands.size();
  GramOperands arguments{{}, true};
  bool wide = false;
  for (size_t i = 0; i < count; ++i) {
    arguments.v[i] = operands[i];
    arguments.flat = arguments.flat && is_flat(operands[i], channels, elements);
    wide = wide || operands[i].type == kFloat64;
  }
  const Kernel kernel = wide ? kernel_for<double>(count) : kernel_for<float>(count);
  kernel<<<dim3(unsigned(chunks), grid_of(1, batch).y), kGramThreads, 0, stream_of(queue)>>>(
      arguments, partial, batch, n, std::max<int64_t>(elements, 1), chunks);
  expect_launched("gram", {int64_t(count), batch, n});
  gram_finish_kernel<<<grid_of(int64_t(count * (count + 1)), batch), 32, 0, stream_of(queue)>>>(partial, out, batch,
                                                                                               int(count), chunks);
  expect_launched("gram_finish", {int64_t(count), batch, chunks});
}

}  // namespace fastdiff
