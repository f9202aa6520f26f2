#include "cpu/linear_loop.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

void linear(const Linear& a) {
  if (a.weight_type == kBFloat16) return multiply_direct<Brains>(a, float_rows<Brains>(a, 2), (a.inner + 1) / 2, a.epilogue);
  multiply_direct<Floats>(a, float_rows<Floats>(a, 1), a.inner, a.epilogue);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
