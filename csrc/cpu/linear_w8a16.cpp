#include "cpu/linear_expand.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

void linear_w8a16(const Linear& a) { multiply_floats<Int8>(a); }

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
