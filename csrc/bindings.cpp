// The table of contents of the CPU module: every op's prototype beside its binding. Arguments are addresses, sizes,
// strides in elements and type codes (common/types.h); contracts in fastdiff/ops check them before they come here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "cpu/bound_step.h"
#include "cpu/dispatch.h"
#include "cpu/gram.h"
#include "cpu/parallel.h"
#include "cpu/philox_normal.h"
#include "cpu/stream_triad.h"
#if defined(FASTDIFF_FAULTS)
#include "cpu/faults.h"
#endif

namespace py = pybind11;
namespace fastdiff {
namespace {

// elements from which a call lets other Python threads run: below, waiting for the interpreter lock costs more
constexpr int64_t kRelease = 1 << 20;
// elements after which Ctrl-C is looked for: about 50 ms of the slowest instruction set
constexpr int64_t kInterrupt = 1 << 23;

template <class F>
void run_released(int64_t elements, F&& work) {
  if (elements < kRelease) return work();
  {
    py::gil_scoped_release released;
    work();
  }
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// philox_normal(out [rows, n] float32, seed [rows] int64, step [rows] int32, stream [rows] int32, rows, n)
void philox_normal_cpu(uintptr_t out, uintptr_t seed, uintptr_t step, uintptr_t stream, int64_t rows, int64_t n) {
  const int64_t part = rows > 0 ? std::max<int64_t>(kInterrupt / rows / 4 * 4, 4) : n;
  for (int64_t first = 0; first < n; first += part) {
    const int64_t count = std::min(part, n - first);
    run_released(rows * count, [&] {
      philox_normal(pointer<float>(out) + first, pointer<const int64_t>(seed), pointer<const int32_t>(step),
                    pointer<const int32_t>(stream), rows, n, first, count);
    });
  }
}

// stream_triad(out [n] float32, a [n] float32, b [n] float32, n): what benchmarks call the memory's limit
void stream_triad_cpu(uintptr_t out, uintptr_t a, uintptr_t b, int64_t n) {
  if ((out | a | b | uintptr_t(n)) % 64) throw std::invalid_argument("stream_triad: addresses and n must be multiples of 64");
  run_released(n, [&] { stream_triad(pointer<float>(out), pointer<const float>(a), pointer<const float>(b), n); });
}

// gram(out [batch, N, N + 1] float64, operands N x (address, type, (batch, channel, element stride)), batch, channels,
// elements)
using Strided = std::tuple<uintptr_t, int, std::array<int64_t, 3>>;
void gram_cpu(uintptr_t out, const std::vector<Strided>& operands, int64_t batch, int64_t channels, int64_t elements) {
  const int count = int(operands.size());
  if (count > kMaxOperands) throw std::invalid_argument("gram: operands must be at most 8");
  const int64_t size = channels * elements, chunks = (size + kGramChunk - 1) / kGramChunk;
  const int64_t part = std::max<int64_t>(kInterrupt / std::max<int64_t>(size * count, 1), 1);
  std::vector<double> partial(size_t(std::min(part, batch) * chunks * kMaxProducts));
  for (int64_t first = 0; first < batch; first += part) {
    const int64_t rows = std::min(part, batch - first);
    Gram task{count, {}, rows, channels, elements, pointer<double>(out) + first * count * (count + 1), partial.data()};
    for (int k = 0; k < count; ++k) {
      const auto& [data, type, stride] = operands[size_t(k)];
      task.operand[k] = {pointer<char>(data) + first * stride[0] * size_of(type), {stride[0], stride[1], stride[2]}, type};
    }
    run_released(rows * size * count, [&] { gram(task); });
  }
}

// A bound solver step and what its model outputs looked like when they were last checked. The comparison is done here,
// attribute by attribute: in Python it costs more than the step of a small image.
class CheckedStep {
 public:
  using Layout = std::tuple<int, int64_t, std::array<int64_t, 3>>;  // type, rows, strides

  template <class... A>
  explicit CheckedStep(uintptr_t source, const A&... fixed) : source_(source), step_(fixed...) {}

  // The outputs of the following calls look like these.
  void expect(const py::list& outputs, const std::vector<Layout>& layouts) {
    std::vector<BoundStep::Layout> native;
    for (const auto& [type, rows, stride] : layouts) native.push_back({type, rows, stride});
    step_.expect(native);
    kinds_.clear();
    for (py::handle m : outputs) kinds_.push_back({m.attr("dtype"), m.attr("device"), m.attr("shape"), m.attr("stride")()});
  }

  // False, and nothing done, where the outputs look different.
  bool run(const py::list& outputs) {
    if (outputs.size() != kinds_.size()) return false;
    std::array<uintptr_t, kMaxOutputs> address{};
    for (size_t j = 0; j < kinds_.size(); ++j) {
      PyObject* m = PyList_GET_ITEM(outputs.ptr(), Py_ssize_t(j));
      const bool repeated = j > 0 && m == PyList_GET_ITEM(outputs.ptr(), Py_ssize_t(j - 1));
      if (repeated ? !kinds_[j].same(kinds_[j - 1]) : !kinds_[j].fits(m)) return false;
      address[j] = repeated ? address[j - 1] : PyLong_AsSize_t(own(PyObject_CallMethodNoArgs(m, names().data_ptr)).ptr());
    }
    // not interrupted half way: a state of which one part is a step ahead of the rest is worth nothing
    run_released(step_.elements(), [&] { step_.run(source_, address); });
    return true;
  }

 private:
  struct Names {
    PyObject *dtype, *device, *shape, *stride, *data_ptr;
  };
  static const Names& names() {
    const auto make = PyUnicode_InternFromString;
    static const Names kept{make("dtype"), make("device"), make("shape"), make("stride"), make("data_ptr")};
    return kept;
  }
  static py::object own(PyObject* made) {
    if (made == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }
  static bool equal(const py::object& a, const py::object& b) {
    return a.is(b) || PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ) == 1;
  }

  struct Kind {
    py::object dtype, device, shape, stride;
    bool fits(PyObject* m) const {
      return own(PyObject_GetAttr(m, names().dtype)).is(dtype) &&
             equal(own(PyObject_GetAttr(m, names().shape)), shape) &&
             equal(own(PyObject_CallMethodNoArgs(m, names().stride)), stride) &&
             equal(own(PyObject_GetAttr(m, names().device)), device);
    }
    bool same(const Kind& other) const { return dtype.is(other.dtype) && equal(shape, other.shape) && equal(stride, other.stride); }
  };

  uintptr_t source_;
  BoundStep step_;
  std::vector<Kind> kinds_;
};

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(_cpu, m) {
  using namespace fastdiff;
  m.doc() = "CPU kernels of fastdiff; call them through fastdiff.ops";
  m.def("philox_normal", &philox_normal_cpu);
  m.def("gram", &gram_cpu);
  m.def("stream_triad", &stream_triad_cpu);
  py::class_<CheckedStep>(m, "SolverStep")
      .def(py::init<uintptr_t, const std::array<uintptr_t, 9>&, const std::array<int, 2>&, const std::array<int64_t, 7>&,
                    const std::array<int64_t, 4>&>())
      .def("expect", &CheckedStep::expect)
      .def("run", &CheckedStep::run);

  parallel_runtime();  // registers the fork handler before anybody can fork
  m.def("isa", [] { return isa_name(isa()); }, "The instruction set in use.");
  m.def("isa_detected", [] { return isa_name(isa_detected()); }, "The best instruction set this machine runs.");
  m.def("threads_from", &parallel_runtime, "Whose threads the kernels run on.");
#if defined(FASTDIFF_FAULTS)
  m.def("fault", &fault, "Commits a planted memory or arithmetic fault, which a sanitizer must catch.");
#endif
}
