#include "cpu/activate.h"

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// activate(out [rows, n], x, type, kind, gated, rows, n, stride of x's rows)
void call(uintptr_t out, uintptr_t x, int type, int kind, bool gated, int64_t rows, int64_t n, int64_t stride) {
  const Activate task{pointer<const void>(x), pointer<void>(out), type, kind, gated, rows, n, stride};
  submit(rows * n, [task] { activate(task); });
}

}  // namespace

void bind_activate(py::module_& m) { m.def("activate", &call); }

}  // namespace fastdiff
