#include "cpu/conv2d.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bind/submit.h"
#include "common/types.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

using Segment = std::tuple<uintptr_t, int, int64_t, uintptr_t, int64_t>;
using Weight = std::tuple<uintptr_t, int, uintptr_t, uintptr_t>;
using Out = std::tuple<uintptr_t, int, uintptr_t>;
using Added = std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, int>;

// conv2d(segments (address, type, channels, scales, number of scales), weight (address, type, scales, sums), out (address,
// type, scale), added (bias, emb, stride of emb, residual, its type), sizes (batch, height, width, height, width and channels
// of out, kernel, stride, left, top, upsample))
void call(const std::vector<Segment>& segments, const Weight& weight, const Out& out, const Added& added,
          const std::array<int64_t, 11>& sizes) {
  Conv2d task{};
  task.segments = int(segments.size());
  int64_t steps = 0;
  for (size_t s = 0; s < segments.size() && s < 2; ++s) {
    const auto& [data, type, channels, scale, scales] = segments[s];
    task.segment[s] = {pointer<const void>(data), type, channels, pointer<const float>(scale), scales};
    steps += channels * sizes[6] * sizes[6];
  }
  task.weight = pointer<const void>(std::get<0>(weight));
  task.weight_type = std::get<1>(weight);
  task.weight_scale = pointer<const float>(std::get<2>(weight));
  task.weight_sum = pointer<const int32_t>(std::get<3>(weight));
  task.out = pointer<void>(std::get<0>(out));
  task.out_type = std::get<1>(out);
  task.out_scale = pointer<const float>(std::get<2>(out));
  task.bias = pointer<const float>(std::get<0>(added));
  task.emb = pointer<const float>(std::get<1>(added));
  task.emb_stride = std::get<2>(added);
  task.residual = pointer<const void>(std::get<3>(added));
  task.residual_type = std::get<4>(added);
  int64_t* const fields[] = {&task.batch,   &task.height, &task.width,  &task.out_height, &task.out_width, &task.outputs,
                             &task.kernel,  &task.stride, &task.left,   &task.top,        &task.upsample};
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  submit(task.batch * task.out_height * task.out_width * task.outputs * steps / 64, [task] { conv2d(task); });
}

}  // namespace

void bind_conv2d(py::module_& m) { m.def("conv2d", &call); }

}  // namespace fastdiff
