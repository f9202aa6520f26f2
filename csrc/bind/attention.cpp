#include "cpu/attention.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// attention(out [B, N, H, D], lse [B, H, N] float32 or 0, type of q, k, v and out, then address and strides of q, k, v,
// (B, N, M, H, key heads, D), mask (address, type or kNoMask or kBoolMask, strides), lengths or 0, scale, precision)
using Strides = std::array<int64_t, 4>;
void call(uintptr_t out, uintptr_t lse, int type, uintptr_t q, const Strides& qs, uintptr_t k, const Strides& ks,
          uintptr_t v, const Strides& vs, const std::array<int64_t, 6>& n, uintptr_t mask, int mask_type, const Strides& ms,
          uintptr_t lengths, float scale, int precision) {
  if (n[5] > kAttentionDim) throw std::invalid_argument("attention: the head dimension must be at most 1024");
  Attention task{{pointer<void>(q), qs[0], qs[1], qs[2]},
                 {pointer<void>(k), ks[0], ks[1], ks[2]},
                 {pointer<void>(v), vs[0], vs[1], vs[2]},
                 type, n[0], n[1], n[2], n[3], n[4], n[5],
                 pointer<void>(mask), mask_type, {ms[0], ms[1], ms[2], ms[3]},
                 pointer<const int32_t>(lengths), scale, precision, pointer<void>(out), pointer<float>(lse)};
  submit(n[0] * n[1] * n[3] * (n[2] * n[5] / 32 + n[5]), [task] { attention(task); });
}

}  // namespace

void bind_attention(py::module_& m) { m.def("attention", &call); }

}  // namespace fastdiff
