#include "cpu/qk_norm_rope.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

using Rows = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // address or 0, type, strides: sample, token, head

QkNormRope::Rows rows(const Rows& r) {
  return {pointer<const void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r), std::get<3>(r), std::get<4>(r)};
}

// qk_norm_rope(out, out_type, x, weight, cosine, sine, batch, tokens, heads, dim, eps or negative for no norm, interleaved)
void call(uintptr_t out, int out_type, const Rows& x, const Rows& weight, const Rows& cosine, const Rows& sine,
          int64_t batch, int64_t tokens, int64_t heads, int64_t dim, float eps, bool interleaved) {
  if (dim > kMaxHeadDim) throw std::invalid_argument("qk_norm_rope: D must be at most 1024");
  const QkNormRope task{rows(x), rows(weight), rows(cosine), rows(sine), pointer<void>(out), out_type,
                        batch, tokens, heads, dim, eps, eps >= 0, interleaved};
  submit(batch * tokens * heads * dim, [task] { qk_norm_rope(task); });
}

}  // namespace

void bind_qk_norm_rope(py::module_& m) { m.def("qk_norm_rope", &call); }

}  // namespace fastdiff
