// The element code of the CUDA kernels, run on the CPU: a thread after another, in the launches' order of work.
#include <vector>

#include "cuda/gram.cuh"
#include "cuda/solver_step.cuh"

using namespace fastdiff;

namespace {

template <class T>
void step_sample(const SolverStep& s, int32_t line, int64_t b, int64_t quads) {
  Head<T> head;
  for (int lane = 0; lane < 32; ++lane) read_head(s, line, b, lane, head);
  if (head.row < 0) return;
  if (s.field) {
    head.scale = false;
    for (int thread = 0; thread < 8; ++thread) head.scale = head.scale || any_scale<T>(s, head.row, thread, 8);
  }
  for (int64_t q = 0; q < quads; ++q) {
    if (!s.flat) {
      step_each(s, head, b, q);
      continue;
    }
    T x[4];
    load_four(static_cast<const T*>(s.x) + b * s.channels * s.elements + 4 * q, x);
    step_four(s, head, b, q, x);
  }
}

template <class T, int N>
void sum_chunk(const GramOperands& operands, double* partial, int64_t b, int64_t n, int64_t elements, int64_t chunk,
               int64_t chunks) {
  constexpr int kProducts = products(N);
  std::vector<double> sums(kProducts, 0.0);
  for (int warp = 0; warp < kGramThreads / 32; ++warp) {
    T total[32][kProducts] = {};
    for (int lane = 0; lane < 32; ++lane)
      add_products<T, N>(operands, b, chunk, 32 * warp + lane, n, elements, total[lane]);
    for (int k = 0; k < kProducts; ++k) {
      for (int offset = 16; offset > 0; offset /= 2)
        for (int lane = 0; lane < offset; ++lane) total[lane][k] += total[lane + offset][k];
      sums[size_t(k)] += double(total[0][k]);
    }
  }
  for (int k = 0; k < kProducts; ++k) partial[(b * kProducts + k) * chunks + chunk] = sums[size_t(k)];
}

template <class T>
void sum_chunk(int count, const GramOperands& o, double* p, int64_t b, int64_t n, int64_t e, int64_t chunk, int64_t chunks) {
  using Sum = void (*)(const GramOperands&, double*, int64_t, int64_t, int64_t, int64_t, int64_t);
  const Sum sums[] = {sum_chunk<T, 1>, sum_chunk<T, 2>, sum_chunk<T, 3>, sum_chunk<T, 4>,
                      sum_chunk<T, 5>, sum_chunk<T, 6>, sum_chunk<T, 7>, sum_chunk<T, 8>};
  sums[count - 1](o, p, b, n, e, chunk, chunks);
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

// output: 6 numbers each: address, type, rows, strides. flat: 0 takes the general path everywhere. Returns the path.
extern "C" __attribute__((visibility("default"))) int solver_step_host(const int64_t* address, const int64_t* type,
                                                                       const int64_t* size, const int64_t* coef_stride,
                                                                       int outputs, const int64_t* output, int flat) {
  SolverStep s = {pointer<void>(address[0]), pointer<void>(address[1]), pointer<void>(address[2]),
                  pointer<int32_t>(address[3]), nullptr, pointer<void>(address[5]), pointer<void>(address[6]),
                  pointer<int32_t>(address[7]), pointer<int32_t>(address[8]), pointer<int64_t>(address[9]),
                  pointer<int32_t>(address[10]), size[0], size[1], size[2], size[3], size[4], size[5], size[6],
                  {coef_stride[0], coef_stride[1], coef_stride[2], coef_stride[3]}, int(type[0]), int(type[1]), outputs,
                  {}, 0, false, false};
  for (int j = 0; j < outputs; ++j, output += 6)
    s.output[j] = {pointer<void>(output[0]), output[2], {output[3], output[4], output[5]}, int(output[1]), false};
  prepare(s);
  s.flat = s.flat && flat;
  const int32_t line = *s.tick;
  const int64_t quads = (s.channels * s.elements + 3) / 4;
  for (int64_t b = 0; b < s.batch; ++b)
    s.state_type == kFloat64 ? step_sample<double>(s, line, b, quads) : step_sample<float>(s, line, b, quads);
  if (line >= 0 && line < s.lines) *s.tick = line + 1;
  return (s.flat ? 1 : 0) + (s.field ? 2 : 0);
}

// operand: 5 numbers each: address, type, strides. Returns the number of chunks; partial: [batch, products, chunks].
extern "C" __attribute__((visibility("default"))) int64_t gram_host(double* partial, int count, const int64_t* operand,
                                                                    int64_t batch, int64_t channels, int64_t elements) {
  GramOperands operands{{}, true};
  bool wide = false;
  for (int i = 0; i < count; ++i, operand += 5) {
    operands.v[i] = {pointer<void>(operand[0]), int(operand[1]), operand[2], operand[3], operand[4]};
    operands.flat = operands.flat && is_flat(operands.v[i], channels, elements);
    wide = wide || operands.v[i].type == kFloat64;
  }
  const int64_t n = channels * elements, chunks = n > kGramChunk ? (n + kGramChunk - 1) / kGramChunk : 1;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      wide ? sum_chunk<double>(count, operands, partial, b, n, elements > 0 ? elements : 1, chunk, chunks)
           : sum_chunk<float>(count, operands, partial, b, n, elements > 0 ? elements : 1, chunk, chunks);
  return chunks;
}
