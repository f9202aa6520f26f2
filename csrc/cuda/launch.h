// What the bindings know of a launch; no CUDA header, so that the bindings need none.
#pragma once
#include <cstdint>
#include <string>

namespace fastdiff {

// Where a kernel goes: the index of a device and one of its streams.
struct Queue {
  int device;
  void* stream;
};

// "" or, in a sentence, why no kernel of this module can run on the current device.
std::string unusable();

}  // namespace fastdiff
