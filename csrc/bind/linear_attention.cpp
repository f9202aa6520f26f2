#include "cpu/linear_attention.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

using Heads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides: sample, token, head

LinearAttention::Heads heads_of(const Heads& x) {
  return {pointer<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

// linear_attention(out, type of all, q, k, v, batch, queries, keys, heads, dim, eps)
void call(uintptr_t out, int type, const Heads& q, const Heads& k, const Heads& v, int64_t batch, int64_t queries,
          int64_t keys, int64_t heads, int64_t dim, float eps) {
  const LinearAttention task{heads_of(q), heads_of(k), heads_of(v), pointer<void>(out), type,
                             batch, queries, keys, heads, dim, eps};
  submit(batch * heads * (queries + keys) * dim * dim / 64, [task] { linear_attention(task); });
}

}  // namespace

void bind_linear_attention(py::module_& m) { m.def("linear_attention", &call); }

}  // namespace fastdiff
