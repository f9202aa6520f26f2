// The table of contents of the CPU module: one line per op, whose binding is bind/<op>.cpp. Arguments are addresses, sizes,
// strides in elements and type codes (common/types.h); contracts in fastdiff/ops check them before they come here.
#include "bind/submit.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/stream_triad.h"
#if defined(FASTDIFF_FAULTS)
#include "cpu/faults.h"
#endif

namespace py = pybind11;
namespace fastdiff {

void bind_activate(py::module_&);
void bind_attention(py::module_&);
void bind_conv2d(py::module_&);
void bind_copy(py::module_&);
void bind_depthwise_conv2d(py::module_&);
void bind_gram(py::module_&);
void bind_group_norm(py::module_&);
void bind_linear(py::module_&);
void bind_linear_attention(py::module_&);
void bind_norm_modulate(py::module_&);
void bind_philox_normal(py::module_&);
void bind_program(py::module_&);
void bind_qk_norm_rope(py::module_&);
void bind_quantize_rows(py::module_&);
void bind_quantize_static(py::module_&);
void bind_resample(py::module_&);
void bind_scale_channels(py::module_&);
void bind_solver_step(py::module_&);

namespace {

// stream_triad(out [n] float32, a [n] float32, b [n] float32, n): what benchmarks call the memory's limit
void stream_triad_cpu(uintptr_t out, uintptr_t a, uintptr_t b, int64_t n) {
  if ((out | a | b | uintptr_t(n)) % 64) throw std::invalid_argument("stream_triad: addresses and n must be multiples of 64");
  run_released(n, [&] { stream_triad(pointer<float>(out), pointer<const float>(a), pointer<const float>(b), n); });
}

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(_cpu, m) {
  using namespace fastdiff;
  m.doc() = "CPU kernels of fastdiff; call them through fastdiff.ops";
  bind_activate(m);
  bind_attention(m);
  bind_conv2d(m);
  bind_copy(m);
  bind_depthwise_conv2d(m);
  bind_gram(m);
  bind_group_norm(m);
  bind_linear(m);
  bind_linear_attention(m);
  bind_norm_modulate(m);
  bind_philox_normal(m);
  bind_program(m);
  bind_qk_norm_rope(m);
  bind_quantize_rows(m);
  bind_quantize_static(m);
  bind_resample(m);
  bind_scale_channels(m);
  bind_solver_step(m);
  m.def("stream_triad", &stream_triad_cpu);

  parallel_runtime();  // registers the fork handler before anybody can fork
  m.def("isa", [] { return isa_name(isa()); }, "The instruction set in use.");
  m.def("isa_detected", [] { return isa_name(isa_detected()); }, "The best instruction set this machine runs.");
  m.def("threads_from", &parallel_runtime, "Whose threads the kernels run on.");
#if defined(FASTDIFF_FAULTS)
  m.def("fault", &fault, "Commits a planted memory or arithmetic fault, which a sanitizer must catch.");
#endif
}
