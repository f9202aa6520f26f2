// What every binding shares: addresses as pointers, work without the interpreter lock, and recording.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind/program.h"

namespace fastdiff {

// elements from which a call lets other Python threads run: below, waiting for the interpreter lock costs more
constexpr int64_t kRelease = 1 << 20;
// elements after which Ctrl-C is looked for: about 50 ms of the slowest instruction set
constexpr int64_t kInterrupt = 1 << 23;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class F>
void run_released(int64_t elements, F&& work) {
  if (elements < kRelease) return work();
  {
    pybind11::gil_scoped_release released;
    work();
  }
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

// Runs `work` now and, while a program is being recorded on this thread, again each time that program runs. `work` holds
// addresses by value. `elements` is its cost: elements touched, or multiplications / 64.
template <class F>
void submit(int64_t elements, F work, const char* file = __builtin_FILE()) {
  if (Program* program = Program::recording()) program->add(elements, file, work);
  run_released(elements, work);
}

}  // namespace fastdiff
