#include "cpu/group_norm.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

using Input = std::tuple<uintptr_t, int, int64_t>;   // address, type, channels
using Vector = std::tuple<uintptr_t, int, int64_t>;  // address or 0, type, stride of samples

GroupNorm::Input input(const Input& x) { return {pointer<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }
GroupNorm::Vector vector(const Vector& v) {
  return {pointer<const void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v)};
}

// group_norm(out, out_type, x, x2, weight, bias, scale, shift, out_scale or 0, batch, pixels, groups, eps, silu), and the
// same for channels before pixels
template <void (*kKernel)(const GroupNorm&)>
void call(uintptr_t out, int out_type, const Input& x, const Input& x2, const Vector& weight, const Vector& bias,
          const Vector& scale, const Vector& shift, uintptr_t out_scale, int64_t batch, int64_t pixels, int64_t groups,
          float eps, bool silu) {
  const GroupNorm task{{input(x), input(x2)}, vector(weight), vector(bias), vector(scale), vector(shift),
                       pointer<const float>(out_scale), pointer<void>(out), out_type, batch, pixels, groups, eps, silu};
  submit(batch * pixels * (std::get<2>(x) + std::get<2>(x2)), [task] { kKernel(task); });
}

}  // namespace

void bind_group_norm(py::module_& m) {
  m.def("group_norm", &call<group_norm>);
  m.def("group_norm_nchw", &call<group_norm_nchw>);
}

}  // namespace fastdiff
