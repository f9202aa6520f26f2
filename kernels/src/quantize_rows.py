"""`quantize_rows` in Triton: contract in `fastdiff/ops/quantize_rows.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import int8_codes, magnitude_bits, step_and_inverse
from fastdiff.kernels.row_blocks import MAX_COLUMNS, row_block


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, rows, n, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOOP: tl.constexpr
):
    """One program per ROWS rows. LOOP: they are longer than COLUMNS, and read twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    source, target = x_ptr + row[:, None] * x_stride, codes_ptr + row[:, None] * n
    exists = (row < rows)[:, None]
    if LOOP:
        bits = tl.zeros((ROWS, COLUMNS), tl.int32)
        for first in range(0, n, COLUMNS):
            at = first + column[None, :]
            x = tl.load(source + at, mask=exists & (at < n), other=0.0).to(tl.float32)
            bits = tl.maximum(bits, magnitude_bits(x))
        scale, inverse = step_and_inverse(tl.max(bits, axis=1))
        for first in range(0, n, COLUMNS):
            at = first + column[None, :]
            inside = exists & (at < n)
            x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(target + at, int8_codes(x, inverse[:, None]), mask=inside)
    else:
        inside = exists & (column < n)[None, :]
        x = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale, inverse = step_and_inverse(tl.max(magnitude_bits(x), axis=1))
        tl.store(target + column[None, :], int8_codes(x, inverse[:, None]), mask=inside)
    tl.store(scales_ptr + row, scale, mask=row < rows)


def quantize_rows_triton(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, x_stride: int) -> None:
    """Fills contiguous codes [..., n] and scales [...]; rows of x are x_stride elements apart."""
    rows, n = scales.numel(), codes.shape[-1]
    if rows == 0:
        return
    block = row_block(n)
    quantize_rows_kernel[(triton.cdiv(rows, block.rows),)](
        *(x, codes, scales, rows, n, x_stride),
        ROWS=block.rows,
        COLUMNS=block.columns,
        LOOP=n > MAX_COLUMNS,
        num_warps=block.warps,
    )
