#include "cpu/linear_expand.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

void linear_w4a16(const Linear& a) { multiply_floats<Int4>(a); }

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
