#include "cpu/gram.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <tuple>
#include <vector>

#include "bind/submit.h"
#include "common/types.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// gram(out [batch, N, N + 1] float64, operands N x (address, type, (batch, channel, element stride)), batch, channels,
// elements)
using Strided = std::tuple<uintptr_t, int, std::array<int64_t, 3>>;
void call(uintptr_t out, const std::vector<Strided>& operands, int64_t batch, int64_t channels, int64_t elements) {
  const int count = int(operands.size());
  if (count > kMaxOperands) throw std::invalid_argument("gram: operands must be at most 8");
  const int64_t size = channels * elements, chunks = (size + kGramChunk - 1) / kGramChunk;
  const int64_t part = std::max<int64_t>(kInterrupt / std::max<int64_t>(size * count, 1), 1);
  const auto partial = std::make_shared<std::vector<double>>(size_t(std::min(part, batch) * chunks * kMaxProducts));
  for (int64_t first = 0; first < batch; first += part) {
    const int64_t rows = std::min(part, batch - first);
    Gram task{count, {}, rows, channels, elements, pointer<double>(out) + first * count * (count + 1), partial->data()};
    for (int k = 0; k < count; ++k) {
      const auto& [data, type, stride] = operands[size_t(k)];
      task.operand[k] = {pointer<char>(data) + first * stride[0] * size_of(type), {stride[0], stride[1], stride[2]}, type};
    }
    submit(rows * size * count, [task, partial] { gram(task); });
  }
}

}  // namespace

void bind_gram(py::module_& m) { m.def("gram", &call); }

}  // namespace fastdiff
