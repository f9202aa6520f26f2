#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bind/submit.h"
#include "cpu/bound_step.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

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

void bind_solver_step(py::module_& m) {
  py::class_<CheckedStep>(m, "SolverStep")
      .def(py::init<uintptr_t, const std::array<uintptr_t, 9>&, const std::array<int, 2>&, const std::array<int64_t, 7>&,
                    const std::array<int64_t, 4>&>())
      .def("expect", &CheckedStep::expect)
      .def("run", &CheckedStep::run);
}

}  // namespace fastdiff
