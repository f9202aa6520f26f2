"""`norm_modulate`, `norm_modulate_int8` and `gated_norm_modulate` in Triton: one kernel for the three contracts."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast, int8_codes, magnitude_bits, step_and_inverse
from fastdiff.kernels.row_blocks import row_block


@triton.jit(do_not_specialize=["tokens", "tiles"])
def norm_modulate_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    total_ptr,
    steps_ptr,
    tokens,
    n,
    tiles,
    x_stride_b,
    x_stride_n,
    y_stride_b,
    y_stride_n,
    gate_stride_b,
    scale_stride_b,
    shift_stride_b,
    eps,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (sample, tile of ROWS tokens): rows are read once and stay in registers.

    y_ptr and total_ptr: x + gate * y is what is normalized, and kept. steps_ptr: the result is int8 codes.
    """
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    token = (program % tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists, used = token < tokens, column < n
    inside = exists[:, None] & used[None, :]
    at = token.to(tl.int64)[:, None]
    row = (b * tokens + token)[:, None] * n + column[None, :]

    x = tl.load(x_ptr + b * x_stride_b + at * x_stride_n + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + b * y_stride_b + at * y_stride_n + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            y *= _vector(gate_ptr + b * gate_stride_b, column, used)
        x = cast(x + y, total_ptr.dtype.element_ty)
        tl.store(total_ptr + row, x, mask=inside)
        x = x.to(tl.float32)

    if LAYER:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / n)[:, None], 0.0)
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / n + eps)[:, None]
    if weight_ptr is not None:
        x *= _vector(weight_ptr, column, used)
    if bias_ptr is not None:
        x += _vector(bias_ptr, column, used)
    if scale_ptr is not None:
        x *= 1.0 + _vector(scale_ptr + b * scale_stride_b, column, used)
    if shift_ptr is not None:
        x += _vector(shift_ptr + b * shift_stride_b, column, used)

    if steps_ptr is None:
        tl.store(out_ptr + row, cast(x, out_ptr.dtype.element_ty), mask=inside)
    else:
        step, inverse = step_and_inverse(tl.max(magnitude_bits(tl.where(inside, x, 0.0)), axis=1))
        tl.store(out_ptr + row, int8_codes(x, inverse[:, None]), mask=inside)
        tl.store(steps_ptr + b * tokens + token, step, mask=exists)


@triton.jit
def _vector(pointer, column, used):
    """[1, COLUMNS] float32: what all tokens of a sample share."""
    return tl.load(pointer + column, mask=used, other=0.0).to(tl.float32)[None, :]


def norm_modulate_triton(
    out: torch.Tensor,
    steps: torch.Tensor | None,
    total: torch.Tensor | None,
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    kind: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> None:
    """Fills out [B, N, C], and steps [B, N] where out is int8, total [B, N, C] where y is given; all contiguous."""
    B, N, C = x.shape
    if x.numel() == 0:
        return
    block = row_block(C)
    tiles = triton.cdiv(N, block.rows)
    stride = lambda v: 0 if v is None else v.stride(0)
    norm_modulate_kernel[(B * tiles,)](
        *(x, y, gate, weight, bias, scale, shift, out, total, steps, N, C, tiles, *x.stride()[:2]),
        *(stride(y), 0 if y is None else y.stride(1), stride(gate), stride(scale), stride(shift), eps),
        LAYER=kind == "layer",
        ROWS=block.rows,
        COLUMNS=block.columns,
        num_warps=block.warps,
    )
