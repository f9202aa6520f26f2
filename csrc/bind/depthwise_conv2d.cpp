#include "cpu/depthwise_conv2d.h"

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// depthwise_conv2d(out, out_type, x, type, weight, bias or 0, gated, batch, height, width, channels)
void call(uintptr_t out, int out_type, uintptr_t x, int type, uintptr_t weight, uintptr_t bias, bool gated,
          int64_t batch, int64_t height, int64_t width, int64_t channels) {
  const DepthwiseConv2d task{pointer<const void>(x), pointer<const float>(weight), pointer<const float>(bias),
                             pointer<void>(out), type, out_type, gated, batch, height, width, channels};
  submit(batch * height * width * channels, [task] { depthwise_conv2d(task); });
}

}  // namespace

void bind_depthwise_conv2d(py::module_& m) { m.def("depthwise_conv2d", &call); }

}  // namespace fastdiff
