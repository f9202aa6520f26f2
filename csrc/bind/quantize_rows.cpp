#include "cpu/quantize_rows.h"

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// quantize_rows(codes [rows, n] int8, scales [rows] float32, x, type, rows, n, stride of x's rows)
void call(uintptr_t codes, uintptr_t scales, uintptr_t x, int type, int64_t rows, int64_t n, int64_t stride) {
  submit(rows * n, [=] {
    quantize_rows(pointer<int8_t>(codes), pointer<float>(scales), pointer<const void>(x), type, rows, n, stride);
  });
}

}  // namespace

void bind_quantize_rows(py::module_& m) { m.def("quantize_rows", &call); }

}  // namespace fastdiff
