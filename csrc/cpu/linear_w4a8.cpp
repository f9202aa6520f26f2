#include "cpu/linear_expand.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

void linear_w4a8(const Linear& a) {
  Epilogue e = a.epilogue;
  const Rows rows = code_rows(a, e, Int4::kPerRow);
  multiply_expanded<Int4, Codes>(a, rows, e);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
