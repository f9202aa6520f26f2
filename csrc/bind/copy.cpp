#include "cpu/copy.h"

#include <pybind11/stl.h>

#include <vector>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// copy(out, out_type, in, in_type, shape, strides of in); not empty, at most 6 dimensions longer than 1
void call(uintptr_t out, int out_type, uintptr_t in, int in_type, const std::vector<int64_t>& shape,
          const std::vector<int64_t>& stride) {
  Copy task{pointer<const void>(in), pointer<void>(out), in_type, out_type, 0, {}, {}};
  int64_t total = 1;
  for (size_t d = 0; d < shape.size(); ++d) {
    total *= shape[d];
    if (shape[d] == 1) continue;
    const int last = task.dims - 1;
    if (last >= 0 && task.stride[last] == stride[d] * shape[d]) {
      task.size[last] *= shape[d];
      task.stride[last] = stride[d];
      continue;
    }
    if (task.dims == kCopyDims) throw std::invalid_argument("copy: x must have at most 6 dimensions");
    task.size[task.dims] = shape[d];
    task.stride[task.dims++] = stride[d];
  }
  if (task.dims == 0) {
    task.size[0] = task.stride[0] = 1;
    task.dims = 1;
  }
  submit(total, [task] { copy(task); });
}

}  // namespace

void bind_copy(py::module_& m) { m.def("copy", &call); }

}  // namespace fastdiff
