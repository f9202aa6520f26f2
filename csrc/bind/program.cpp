#include "bind/program.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <utility>

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

// Runs every task once; returns what each is and the microseconds it took.
std::vector<std::pair<std::string, double>> profile(const Program& program) {
  using Clock = std::chrono::steady_clock;
  std::vector<std::pair<std::string, double>> out;
  py::gil_scoped_release released;
  for (const Program::Task& task : program.tasks()) {
    const auto start = Clock::now();
    task.work();
    const std::string file(task.file);
    const size_t name = file.rfind('/') + 1;
    out.emplace_back(file.substr(name, file.rfind('.') - name),
                     std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  return out;
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("start", &start, "Records the kernel calls that this thread makes from now on.")
      .def("stop", &stop)
      .def("run", &run, "Makes the recorded calls again. Ctrl-C is looked for between them.")
      .def("profile", &profile, "Makes the recorded calls again and returns (op, microseconds) of each.")
      .def("__len__", &Program::size);
}

}  // namespace fastdiff
