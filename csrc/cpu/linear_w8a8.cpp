#include "cpu/linear_loop.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

void linear_w8a8(const Linear& a) {
  Epilogue e = a.epilogue;
  const Rows rows = code_rows<kCodeOffset>(a, e, 4);
  multiply_direct<Codes>(a, rows, (a.inner + 3) / 4, e);
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
