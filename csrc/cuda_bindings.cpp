// The table of contents of the CUDA module. Arguments are addresses, sizes, strides in elements, type codes
// (common/types.h), a device index and a stream; contracts in fastdiff/ops check them before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"
#include "cuda/philox_normal.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// philox_normal(out [rows, n] float32, seed [rows] int64, step [rows] int32, stream [rows] int32, rows, n, device, queue)
void philox_normal(uintptr_t out, uintptr_t seed, uintptr_t step, uintptr_t stream, int64_t rows, int64_t n, int device,
                   uintptr_t queue) {
  philox_normal_cuda({pointer<float>(out), pointer<const int64_t>(seed), pointer<const int32_t>(step),
                      pointer<const int32_t>(stream), rows, n},
                     {device, pointer<void>(queue)});
}

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastdiff; call them through fastdiff.ops";
  m.def("philox_normal", &fastdiff::philox_normal);
  m.def("unusable", &fastdiff::unusable, "Empty, or a sentence that says why no kernel runs on the current device.");
}
