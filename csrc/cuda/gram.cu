// `gram`: contract in fastdiff/ops/gram.py. Two launches, no atomics; the work split depends on the size of a sample only,
// so neither the batch nor the GPU changes a sum.
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/elements.h"
#include "cuda/launch.h"

namespace fastdiff {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kLanes = 4, kMaxOperands = 8;
constexpr int64_t kBlock = kThreads * kLanes, kChunk = 4 * kBlock;

struct Operands {
  Operand v[kMaxOperands];
  bool wide;  // contiguous samples of a multiple of kLanes elements, aligned to four of them
};

template <typename S>
__device__ __forceinline__ void read(const Operand& v, bool wide, int64_t b, int64_t first, int64_t n, int64_t elements,
                                     S (&out)[kLanes]) {
  if (wide) {
    with_type(v.type, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      Vector<T, kLanes> loaded = {};
      if (first < n) loaded = load_vector<T, kLanes>(static_cast<const T*>(v.data) + b * v.stride_b + first);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) out[i] = S(widen(loaded.v[i]));
    });
  } else {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int64_t c = (first + i) / elements, e = (first + i) % elements;
      out[i] = first + i < n ? element<S>(v.data, v.type, b * v.stride_b + c * v.stride_c + e * v.stride_e) : S(0);
    }
  }
}

// partial[b, k, chunk]: k counts the pairs i <= j, then the sums.
template <typename S, int N>
__global__ void __launch_bounds__(kThreads)
    gram_kernel(const __grid_constant__ Operands operands, double* partial, int64_t n, int64_t elements, int64_t chunks) {
  constexpr int kPairs = N * (N + 1) / 2, kTotals = kPairs + N;
  const int64_t b = int64_t(blockIdx.x) / chunks, chunk = int64_t(blockIdx.x) - b * chunks;
  S total[kTotals] = {};
  for (int part = 0; part < int(kChunk / kBlock); ++part) {
    const int64_t first = chunk * kChunk + part * kBlock + threadIdx.x * kLanes;
    S v[N][kLanes];
#pragma unroll
    for (int i = 0; i < N; ++i) read<S>(operands.v[i], operands.wide, b, first, n, elements, v[i]);
    int k = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int j = i; j < N; ++j, ++k)
        total[k] += (v[i][0] * v[j][0] + v[i][1] * v[j][1]) + (v[i][2] * v[j][2] + v[i][3] * v[j][3]);
      total[kPairs + i] += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    }
  }
  __shared__ S sums[kWarps][kTotals];
#pragma unroll
  for (int k = 0; k < kTotals; ++k) {
    for (int offset = 16; offset > 0; offset /= 2) total[k] += __shfl_down_sync(0xFFFFFFFFu, total[k], offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][k] = total[k];
  }
  __syncthreads();
  if (threadIdx.x >= kTotals) return;
  double sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += double(sums[warp][threadIdx.x]);
  partial[(b * kTotals + threadIdx.x) * chunks + chunk] = sum;
}

// Block (entry, b) sums the chunks of one entry in float64, in a fixed order.
__global__ void __launch_bounds__(32) gram_finish_kernel(const double* partial, double* out, int N, int64_t chunks) {
  const int entry = blockIdx.x, i = entry / (N + 1), j = entry % (N + 1), pairs = N * (N + 1) / 2;
  const int low = i < j ? i : j, high = i < j ? j : i;
  const int k = j == N ? pairs + i : low * N - low * (low - 1) / 2 + high - low;
  const int64_t b = blockIdx.y + int64_t(blockIdx.z) * gridDim.y;
  const double* source = partial + (b * (pairs + N) + k) * chunks;
  double sum = 0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += 32) sum += source[chunk];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x == 0) out[b * N * (N + 1) + entry] = sum;
}

template <typename S>
using Kernel = void (*)(Operands, double*, int64_t, int64_t, int64_t);

template <typename S>
Kernel<S> kernel_for(size_t count) {
  static const Kernel<S> kernels[] = {gram_kernel<S, 1>, gram_kernel<S, 2>, gram_kernel<S, 3>, gram_kernel<S, 4>,
                                      gram_kernel<S, 5>, gram_kernel<S, 6>, gram_kernel<S, 7>, gram_kernel<S, 8>};
  return kernels[count - 1];
}

bool is_wide(const Operand& v, int64_t channels, int64_t elements) {
  const int64_t bytes = kLanes * size_of(v.type);
  return reinterpret_cast<uintptr_t>(v.data) % (bytes < 16 ? bytes : 16) == 0 && v.stride_b % kLanes == 0 &&
         channels * elements % kLanes == 0 && (elements == 1 || v.stride_e == 1) &&
         (channels == 1 || v.stride_c == elements);
}

}  // namespace

int64_t gram_chunks(int64_t n) { return n > kChunk ? (n + kChunk - 1) / kChunk : 1; }

void gram_cuda(double* out, double* partial, const std::vector<Operand>& operands, int64_t batch, int64_t channels,
               int64_t elements, void* queue) {
  if (batch == 0) return;
  const OnDeviceOf device(out);
  const auto stream = static_cast<cudaStream_t>(queue);
  const int64_t n = channels * elements, chunks = gram_chunks(n);
  const auto count = operands.size();
  const std::string sizes = std::to_string(count) + " x [" + std::to_string(batch) + ", " + std::to_string(n) + "]";
  if (batch * chunks >= int64_t(1) << 31 || batch > 65535) throw std::runtime_error("gram: too many samples in " + sizes);
  Operands arguments = {};
  arguments.wide = true;
  bool float64 = false;
  for (size_t i = 0; i < count; ++i) {
    arguments.v[i] = operands[i];
    arguments.wide = arguments.wide && is_wide(operands[i], channels, elements);
    float64 = float64 || operands[i].type == kFloat64;
  }
  const int64_t extent = elements > 0 ? elements : 1;
  const auto kernel = float64 ? kernel_for<double>(count) : kernel_for<float>(count);
  kernel<<<unsigned(batch * chunks), kThreads, 0, stream>>>(arguments, partial, n, extent, chunks);
  expect_launched("gram", sizes);
  const dim3 grid(unsigned(count * (count + 1)), unsigned(batch));
  gram_finish_kernel<<<grid, 32, 0, stream>>>(partial, out, int(count), chunks);
  expect_launched("gram_finish", sizes);
}

}  // namespace fastdiff
