// Planted faults, in sanitizer builds only: a sanitizer job counts when it catches every one of them.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastdiff {

inline int fault(const std::string& kind) {
  volatile int zero = 0;
  if (kind == "heap_overread") {
    std::vector<float> values(8);
    volatile float* p = values.data();
    return int(p[8 + zero]);
  }
  if (kind == "use_after_free") {
    int* p = new int[4];
    volatile int* dangling = p;
    p[0] = 7;
    delete[] p;
    return dangling[zero];
  }
  if (kind == "integer_overflow") {
    volatile int most = 2147483647;
    return most + 1 + zero;
  }
  if (kind == "shift") {
    volatile int places = 40;
    return 1 << places;
  }
  if (kind == "misaligned") {
    alignas(8) static char bytes[16];
    volatile int* p = reinterpret_cast<volatile int*>(bytes + 1 + zero);
    return *p;
  }
  throw std::invalid_argument("fault: unknown kind " + kind);
}

}  // namespace fastdiff
