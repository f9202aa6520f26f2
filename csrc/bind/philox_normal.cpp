#include "cpu/philox_normal.h"

#include <algorithm>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// philox_normal(out [rows, n] float32, seed [rows] int64, step [rows] int32, stream [rows] int32, rows, n)
void call(uintptr_t out, uintptr_t seed, uintptr_t step, uintptr_t stream, int64_t rows, int64_t n) {
  const int64_t part = rows > 0 ? std::max<int64_t>(kInterrupt / rows / 4 * 4, 4) : n;
  for (int64_t first = 0; first < n; first += part) {
    const int64_t count = std::min(part, n - first);
    submit(rows * count, [=] {
      philox_normal(pointer<float>(out) + first, pointer<const int64_t>(seed), pointer<const int32_t>(step),
                    pointer<const int32_t>(stream), rows, n, first, count);
    });
  }
}

}  // namespace

void bind_philox_normal(py::module_& m) { m.def("philox_normal", &call); }

}  // namespace fastdiff
