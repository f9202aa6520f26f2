#include "cpu/norm_modulate.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

using Rows = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, type, strides of samples and tokens
using Vector = std::tuple<uintptr_t, int, int64_t>;         // address or 0, type, stride of samples

NormModulate::Rows rows(const Rows& r) {
  return {pointer<const void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r), std::get<3>(r)};
}
NormModulate::Vector vector(const Vector& v) {
  return {pointer<const void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v)};
}

// norm_modulate(out, out_type, scales or 0, sum or 0, x, y, gate, weight, bias, scale, shift, batch, tokens, channels, eps,
// centred)
void call(uintptr_t out, int out_type, uintptr_t scales, uintptr_t sum, const Rows& x, const Rows& y, const Vector& gate,
          const Vector& weight, const Vector& bias, const Vector& scale, const Vector& shift, int64_t batch, int64_t tokens,
          int64_t channels, float eps, bool centred) {
  const NormModulate task{rows(x), rows(y), pointer<void>(sum), vector(gate), vector(weight), vector(bias), vector(scale),
                          vector(shift), pointer<void>(out), out_type, pointer<float>(scales), batch, tokens, channels, eps,
                          centred};
  submit(batch * tokens * channels, [task] { norm_modulate(task); });
}

}  // namespace

void bind_norm_modulate(py::module_& m) { m.def("norm_modulate", &call); }

}  // namespace fastdiff
