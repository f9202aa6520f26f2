"""What follows the sums of a linear layer, on the tile that holds them: scales, bias, activation, gate, residual."""

import triton
import triton.language as tl

from fastdiff.kernels.activate import activation
from fastdiff.kernels.rounding import cast, int8_codes

PAIR = tl.constexpr(16)  # columns of values, then as many of their gates


@triton.jit
def finish_in_parts(
    acc,
    row,
    first,
    rows,
    N,
    wide,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    x_scale_step,
    gate_rows,
    gate_stride,
    residual_stride,
    KIND: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`finish` on PARTS (1, 2 or 4) ranges of columns one after another, which needs fewer registers."""
    if PARTS == 1:
        # fmt: off
        finish(
            acc, row, first, rows, N, wide, x_scale_ptr, scale_ptr, bias_ptr, gate_ptr, residual_ptr, out_scale_ptr,
            out_ptr, x_scale_step, gate_rows, gate_stride, residual_stride, KIND, PAIRS,
        )
        # fmt: on
    else:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(acc.reshape(acc.shape[0], 2, half).permute(0, 2, 1))
        # fmt: off
        finish_in_parts(
            left, row, first, rows, N, wide, x_scale_ptr, scale_ptr, bias_ptr, gate_ptr, residual_ptr, out_scale_ptr,
            out_ptr, x_scale_step, gate_rows, gate_stride, residual_stride, KIND, PAIRS, PARTS // 2,
        )
        finish_in_parts(
            right, row, first + half, rows, N, wide, x_scale_ptr, scale_ptr, bias_ptr, gate_ptr, residual_ptr,
            out_scale_ptr, out_ptr, x_scale_step, gate_rows, gate_stride, residual_stride, KIND, PAIRS, PARTS // 2,
        )
        # fmt: on


@triton.jit
def finish(
    acc,
    row,
    first,
    rows,
    N,
    wide,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    x_scale_step,
    gate_rows,
    gate_stride,
    residual_stride,
    KIND: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Stores residual + gate * activation(x_scale * scale * acc + bias) of some rows and of columns from `first` on.

    acc   [M, W] int32 or float32: columns of the weight, of which `wide` exist; with PAIRS two for each of the result
    gate  [., N], of which gate_rows rows share one
    out   [rows, N]; int8 codes where there is out_scale, NaN as -127
    """
    W: tl.constexpr = acc.shape[1]
    column = first + tl.arange(0, W)
    y = acc.to(tl.float32)
    if x_scale_ptr is not None:
        y *= tl.load(x_scale_ptr + row.to(tl.int64) * x_scale_step, mask=row < rows, other=0.0)[:, None]
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + column, mask=column < wide, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < wide, other=0.0).to(tl.float32)[None, :]
    if PAIRS:
        blocks = y.reshape(acc.shape[0], W // (2 * PAIR), 2, PAIR).permute(0, 1, 3, 2)
        value, gated = tl.split(blocks)
        y = (value * activation(gated, KIND)).reshape(acc.shape[0], W // 2)
        column = first // 2 + tl.arange(0, W // 2)
    elif KIND != "none":
        y = activation(y, KIND)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    if gate_ptr is not None:
        source = gate_ptr + (row // gate_rows).to(tl.int64)[:, None] * gate_stride + column[None, :]
        y *= tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        source = residual_ptr + row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        y += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    if out_scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(out_scale_ptr))
        tl.store(target, int8_codes(tl.where(y == y, y, float("-inf")), inverse), mask=inside)
    else:
        tl.store(target, cast(y, out_ptr.dtype.element_ty), mask=inside)
