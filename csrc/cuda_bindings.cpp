// The table of contents of the CUDA module: every op's binding. Arguments are addresses, sizes, strides in elements, type
// codes (common/types.h) and the stream; contracts in fastdiff/ops check them before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

using OperandTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // address, type, strides of b, c, e

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Operand operand(const OperandTuple& t) {
  return {pointer<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

void philox_normal(uintptr_t out, uintptr_t seed, uintptr_t step, uintptr_t stream, int64_t rows, int64_t n,
                   uintptr_t queue) {
  philox_normal_cuda(pointer<float>(out), pointer<const int64_t>(seed), pointer<const int32_t>(step),
                     pointer<const int32_t>(stream), rows, n, pointer<void>(queue));
}

// addresses: x, history, model_input, tick, source, aux, coef, meta, rows, seed
void solver_step(const std::array<uintptr_t, 10>& addresses, const std::array<int, 2>& types,
                 const std::array<int64_t, 5>& sizes, const std::vector<OperandTuple>& outputs,
                 const std::array<int64_t, 4>& coef_strides, const std::array<int64_t, 2>& coef_extent, uintptr_t queue) {
  if (outputs.size() > 4) throw py::value_error("solver_step: at most 4 outputs");
  SolverStep s = {};
  s.x = pointer<void>(addresses[0]);
  s.history = pointer<void>(addresses[1]);
  s.model_input = pointer<void>(addresses[2]);
  s.tick = pointer<int32_t>(addresses[3]);
  s.source = pointer<const int32_t>(addresses[4]);
  s.aux = pointer<const void>(addresses[5]);
  s.coef = pointer<const void>(addresses[6]);
  s.meta = pointer<const int32_t>(addresses[7]);
  s.rows = pointer<const int32_t>(addresses[8]);
  s.seed = pointer<const int64_t>(addresses[9]);
  s.state_type = types[0];
  s.input_type = types[1];
  s.batch = sizes[0];
  s.channels = sizes[1];
  s.elements = sizes[2];
  s.slots = int(sizes[3]);
  s.copies = int(sizes[4]);
  s.outputs = int(outputs.size());
  for (size_t j = 0; j < outputs.size(); ++j) s.output[j] = operand(outputs[j]);
  s.coef_stride_r = coef_strides[0];
  s.coef_stride_k = coef_strides[1];
  s.coef_stride_c = coef_extent[0] > 1 ? coef_strides[2] : 0;
  s.coef_stride_e = coef_extent[1] > 1 ? coef_strides[3] : 0;
  s.coef_channels = coef_extent[0];
  s.coef_elements = coef_extent[1];
  solver_step_cuda(s, pointer<void>(queue));
}

// sizes: batch, channels, elements
void gram(uintptr_t out, uintptr_t partial, const std::vector<OperandTuple>& operands, const std::array<int64_t, 3>& sizes,
          uintptr_t queue) {
  if (operands.empty() || operands.size() > 8) throw py::value_error("gram: 1 to 8 operands");
  std::vector<Operand> v;
  for (const auto& t : operands) v.push_back(operand(t));
  gram_cuda(pointer<double>(out), pointer<double>(partial), v, sizes[0], sizes[1], sizes[2], pointer<void>(queue));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastdiff: the contracts are in fastdiff.ops.";
  m.def("unusable", &unusable, "\"\" or a sentence that says why the kernels cannot run in this process.");
  m.def("philox_normal", &philox_normal);
  m.def("solver_step", &solver_step);
  m.def("gram", &gram);
  m.def("gram_chunks", &gram_chunks);
}

}  // namespace fastdiff
