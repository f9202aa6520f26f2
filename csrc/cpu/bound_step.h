// A solver step whose tensors, except the model's outputs, are fixed: what a sampling loop calls once per step.
#pragma once
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/types.h"
#include "cpu/solver_step.h"

namespace fastdiff {

class BoundStep {
 public:
  struct Layout {
    int type;
    int64_t rows;
    std::array<int64_t, 3> stride;
  };

  // addresses: x, history, model_input, tick, aux or 0, coef, meta, rows, seed; types: of x, of model_input
  // sizes: batch, channels, elements, slots, copies of model_input, lines of rows, rows of coef
  BoundStep(const std::array<uintptr_t, 9>& address, const std::array<int, 2>& type, const std::array<int64_t, 7>& size,
            const std::array<int64_t, 4>& coef_stride)
      : lines_(size[5]), table_rows_(size[6]), is_column_(size[2] == 1), active_(size_t(size[0])) {
    step_ = {to<void>(address[0]), to<void>(address[1]), to<void>(address[2]), to<int32_t>(address[3]),
             to<void>(address[4]), to<void>(address[5]), to<int32_t>(address[6]), to<int32_t>(address[7]),
             to<int64_t>(address[8]), nullptr, size[0], size[1], size[2], size[3], size[4],
             {coef_stride[0], coef_stride[1], coef_stride[2], coef_stride[3]}, type[0], type[1], 0, {}, active_.data()};
    if (is_column_) {  // one element per channel: the channels are the elements
      step_.elements = size[1];
      step_.channels = 1;
      step_.coef_stride[3] = coef_stride[2];
      step_.coef_stride[2] = 0;
    }
  }
  BoundStep(const BoundStep&) = delete;

  int64_t elements() const { return step_.batch * step_.channels * step_.elements; }

  // What the outputs of the following calls look like.
  void expect(const std::vector<Layout>& outputs) {
    if (outputs.size() > kMaxOutputs) throw std::invalid_argument("solver_step: outputs must be at most 4");
    step_.outputs = int(outputs.size());
    for (size_t j = 0; j < outputs.size(); ++j) {
      const auto& [type, rows, stride] = outputs[j];
      rows_[j] = rows;
      step_.output[j] = {nullptr, {stride[0], is_column_ ? 0 : stride[1], stride[is_column_ ? 1 : 2]}, type};
    }
  }

  void run(uintptr_t source, const std::array<uintptr_t, kMaxOutputs>& outputs) {
    step_.source = to<int32_t>(source);
    for (int j = 0; j < step_.outputs; ++j) step_.output[j].data = to<void>(outputs[size_t(j)]);
    check();
    solver_step(step_);
  }

 private:
  template <class T>
  static T* to(uintptr_t address) {
    return reinterpret_cast<T*>(address);
  }

  // Indices that live in memory and that nobody could check before. Nothing is written when one is out of range.
  void check() const {
    const int64_t tick = *step_.tick;
    if (tick < 0 || tick >= lines_) throw std::out_of_range("solver_step: tick is past the last line of rows; reset it");
    for (int64_t b = 0; b < step_.batch; ++b) {
      const int32_t row = step_.rows[tick * step_.batch + b];
      if (row < 0) continue;
      if (row >= table_rows_) throw std::out_of_range("solver_step: rows names a row that coef does not have");
      const int32_t* meta = step_.meta + row * kMetaColumns;
      if (meta[0] >= step_.slots || meta[1] >= step_.slots)
        throw std::out_of_range("solver_step: meta names a slot that history does not have");
      for (int j = 0; step_.source && j < step_.outputs; ++j) {
        const int32_t from = step_.source[j * step_.batch + b];
        if (from < 0 || from >= rows_[j]) throw std::out_of_range("solver_step: source names a row that outputs do not have");
      }
    }
  }

  SolverStep step_;
  int64_t lines_, table_rows_;
  bool is_column_;
  std::array<int64_t, kMaxOutputs> rows_{};
  std::vector<uint32_t> active_;
};

}  // namespace fastdiff
