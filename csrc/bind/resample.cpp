#include "cpu/resample.h"

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// resample(out, x, type, average, batch, height, width, channels)
void call(uintptr_t out, uintptr_t x, int type, bool average, int64_t batch, int64_t height, int64_t width,
          int64_t channels) {
  const Resample task{pointer<const void>(x), pointer<void>(out), type, average, batch, height, width, channels};
  submit(batch * height * width * channels, [task] { resample(task); });
}

}  // namespace

void bind_resample(py::module_& m) { m.def("resample", &call); }

}  // namespace fastdiff
