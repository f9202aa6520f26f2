#include "cpu/quantize_static.h"

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// quantize_static(codes [rows, n + tail] int8, tail, x, type, rows, n, stride of x's rows, scale, offset or 0, rows that
// share a scale)
void call(uintptr_t codes, int64_t tail, uintptr_t x, int type, int64_t rows, int64_t n, int64_t stride, uintptr_t scale,
          uintptr_t offset, int64_t share) {
  const StaticCodes a{pointer<int8_t>(codes), pointer<const void>(x), type, rows, n, stride, tail,
                      pointer<const float>(scale), pointer<const float>(offset), share};
  submit(rows * n, [=] { quantize_static(a); });
}

}  // namespace

void bind_quantize_static(py::module_& m) { m.def("quantize_static", &call); }

}  // namespace fastdiff
