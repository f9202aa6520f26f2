#include "cpu/linear.h"

#include "bind/submit.h"

namespace py = pybind11;
namespace fastdiff {
namespace {

// A linear layer of fastdiff/ops/linear*.py: the left operand, the weights, the epilogue, the result. 0 is an absent tensor.
template <void (*kernel)(const Linear&)>
void call(uintptr_t x, int x_type, int64_t rows, int64_t inner, int64_t x_stride, uintptr_t x_scale, int64_t x_scale_stride,
          uintptr_t weight, int weight_type, int64_t panels, uintptr_t weight_scale, uintptr_t weight_sum, int64_t sums,
          int64_t group, int64_t columns, int activation, uintptr_t bias, uintptr_t gate, int64_t gate_stride,
          int64_t rows_per_gate, int gate_type, uintptr_t residual, int64_t residual_stride, int residual_type,
          uintptr_t out_scale, uintptr_t out, int out_type) {
  Linear task{};
  task.rows = rows;
  task.inner = inner;
  task.x = pointer<void>(x);
  task.x_stride = x_stride;
  task.x_type = x_type;
  task.x_scale = pointer<float>(x_scale);
  task.x_scale_stride = x_scale_stride;
  task.weight = pointer<void>(weight);
  task.weight_type = weight_type;
  task.panels = panels;
  task.weight_sum = pointer<int32_t>(weight_sum);
  task.sums = sums;
  task.group = group;
  (group ? task.group_scale : task.epilogue.column_scale) = pointer<float>(weight_scale);
  Epilogue& e = task.epilogue;
  e.columns = columns;
  e.activation = activation;
  e.bias = pointer<float>(bias);
  e.gate = pointer<void>(gate);
  e.gate_stride = gate_stride;
  e.rows_per_gate = rows_per_gate;
  e.gate_type = gate_type;
  e.residual = pointer<void>(residual);
  e.residual_stride = residual_stride;
  e.residual_type = residual_type;
  e.out_scale = pointer<float>(out_scale);
  e.out = pointer<void>(out);
  e.out_stride = columns;
  e.out_type = out_type;
  submit(rows * inner * panels / 4, [task] { kernel(task); });
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear", &call<linear>);
  m.def("linear_w8a8", &call<linear_w8a8>);
  m.def("linear_w8a16", &call<linear_w8a16>);
  m.def("linear_w4a16", &call<linear_w4a16>);
  m.def("linear_w4a8", &call<linear_w4a8>);
}

}  // namespace fastdiff
