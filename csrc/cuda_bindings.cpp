// The table of contents of the CUDA module: every op's prototype beside its binding. Arguments are addresses, sizes,
// strides in elements, type codes (common/types.h), a device index and a stream; contracts in fastdiff/ops check them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/solver_step.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

using Strides = std::array<int64_t, 3>;  // of batch, channel, element

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Queue queue_of(int device, uintptr_t stream) { return {device, pointer<void>(stream)}; }

// philox_normal(out [rows, n] float32, seed [rows] int64, step [rows] int32, stream [rows] int32, rows, n, device, queue)
void philox_normal(uintptr_t out, uintptr_t seed, uintptr_t step, uintptr_t stream, int64_t rows, int64_t n, int device,
                   uintptr_t queue) {
  philox_normal_cuda(pointer<float>(out), pointer<const int64_t>(seed), pointer<const int32_t>(step),
                     pointer<const int32_t>(stream), rows, n, queue_of(device, queue));
}

// gram(out [batch, N, N + 1] float64, partial [batch, products, gram_chunks] float64, operands N x (address, type,
// strides), (batch, channels, elements), device, queue)
void gram(uintptr_t out, uintptr_t partial, const std::vector<std::tuple<uintptr_t, int, Strides>>& operands,
          const std::array<int64_t, 3>& sizes, int device, uintptr_t queue) {
  if (operands.empty() || operands.size() > 8) throw std::invalid_argument("gram: operands must be 1 to 8");
  std::vector<Operand> v;
  for (const auto& [data, type, stride] : operands)
    v.push_back({pointer<const void>(data), type, stride[0], stride[1], stride[2]});
  gram_cuda(pointer<double>(out), pointer<double>(partial), v, sizes[0], sizes[1], sizes[2], queue_of(device, queue));
}

// A solver step whose tensors, except the model's outputs, are fixed.
class BoundStep {
 public:
  using Layout = std::tuple<int, int64_t, Strides>;  // type, rows, strides

  // addresses: x, history, model_input, tick, ticket, aux or 0, coef, meta, rows, seed, source or 0
  // types: of x, of model_input
  // sizes: batch, channels, elements, slots, copies of model_input, lines of rows, rows of coef
  BoundStep(const std::array<uintptr_t, 11>& address, const std::array<int, 2>& type, const std::array<int64_t, 7>& size,
            const std::array<int64_t, 4>& coef_stride) {
    step_ = {pointer<void>(address[0]), pointer<void>(address[1]), pointer<void>(address[2]),
             pointer<int32_t>(address[3]), pointer<uint32_t>(address[4]), pointer<const void>(address[5]),
             pointer<const void>(address[6]), pointer<const int32_t>(address[7]), pointer<const int32_t>(address[8]),
             pointer<const int64_t>(address[9]), pointer<const int32_t>(address[10]), size[0], size[1], size[2],
             size[3], size[4], size[5], size[6], {coef_stride[0], coef_stride[1], coef_stride[2], coef_stride[3]},
             type[0], type[1], 0, {}, 0, false, false};
  }

  // What the outputs of the following calls look like.
  void expect(const std::vector<Layout>& outputs) {
    if (outputs.size() > kMaxOutputs) throw std::invalid_argument("solver_step: outputs must be at most 4");
    step_.outputs = int(outputs.size());
    for (size_t j = 0; j < outputs.size(); ++j) {
      const auto& [type, rows, stride] = outputs[j];
      step_.output[j] = {nullptr, rows, {stride[0], stride[1], stride[2]}, type, false};
    }
  }

  void run(const std::vector<uintptr_t>& outputs, int device, uintptr_t queue) {
    if (int(outputs.size()) != step_.outputs) throw std::invalid_argument("solver_step: outputs are not as expected");
    for (size_t j = 0; j < outputs.size(); ++j) step_.output[j].data = pointer<const void>(outputs[j]);
    solver_step_cuda(step_, queue_of(device, queue));
  }

 private:
  SolverStep step_;
};

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(_cuda, m) {
  using namespace fastdiff;
  m.doc() = "CUDA kernels of fastdiff; call them through fastdiff.ops";
  m.def("unusable", &unusable, "Empty, or a sentence that says why the kernels cannot run in this process.");
  m.def("philox_normal", &philox_normal);
  m.def("gram", &gram);
  m.def("gram_chunks", &gram_chunks, "Partial results of a sample of n elements.");
  py::class_<BoundStep>(m, "SolverStep")
      .def(py::init<const std::array<uintptr_t, 11>&, const std::array<int, 2>&, const std::array<int64_t, 7>&,
                    const std::array<int64_t, 4>&>())
      .def("expect", &BoundStep::expect)
      .def("run", &BoundStep::run);
}
