#include "cpu/linear_expand.h"

namespace fastdiff {
namespace FASTDIFF_ISA {

// -8 times the sum of a row's codes over each piece of k: weights are multiplied as codes + 8
static const int32_t* row_sums(const Linear& a, const Rows& rows) {
  const int64_t pieces = pieces_of(a);
  int32_t* const sums = (int32_t*)workspace(1, size_t(a.rows * pieces + 1) * sizeof(int32_t));
  for_rows(a, [&](int64_t r) {
    const int8_t* code = (const int8_t*)rows.base + r * rows.stride;
    for (int64_t k = 0, piece = 0; k < a.inner; ++piece) {
      int32_t sum = 0;
      for (const int64_t end = k + piece_at(a, k); k < end; ++k) sum += code[k];
      sums[r * pieces + piece] = -8 * sum;
    }
  });
  return sums;
}

void linear_w4a8(const Linear& a) {
  Epilogue e = a.epilogue;
  const Rows rows = code_rows<0>(a, e, Int4::kPerRow);
  multiply_expanded<Int4, Nibbles>(a, rows, e, row_sums(a, rows));
}

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
