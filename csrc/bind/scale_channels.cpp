#include "cpu/scale_channels.h"

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// scale_channels(out [rows, n], its type, x, type, rows, n, stride of x's rows, factor [n] float32)
void call(uintptr_t out, int out_type, uintptr_t x, int type, int64_t rows, int64_t n, int64_t stride, uintptr_t factor) {
  submit(rows * n, [=] {
    scale_channels(pointer<void>(out), out_type, pointer<const void>(x), type, rows, n, stride, pointer<const float>(factor));
  });
}

}  // namespace

void bind_scale_channels(py::module_& m) { m.def("scale_channels", &call); }

}  // namespace fastdiff
