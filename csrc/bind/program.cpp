#include "bind/program.h"

#include <pybind11/pybind11.h>

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

void start(Program& program) {
  if (Program::recording() != nullptr) throw std::runtime_error("program: another one is being recorded on this thread");
  Program::recording() = &program;
}

void stop(Program& program) {
  if (Program::recording() == &program) Program::recording() = nullptr;
}

void run(const Program& program) {
  for (size_t next = 0; next < program.size();) {
    {
      py::gil_scoped_release released;
      next = program.run(next, kInterrupt);
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("start", &start, "Records the kernel calls that this thread makes from now on.")
      .def("stop", &stop)
      .def("run", &run, "Makes the recorded calls again. Ctrl-C is looked for between them.")
      .def("__len__", &Program::size);
}

}  // namespace fastdiff
