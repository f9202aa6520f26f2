"""`scale_channels` in Triton: contract in `fastdiff/ops/scale_channels.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast
from fastdiff.kernels.row_blocks import tile_of

OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["rows", "columns"])
def scale_channels_kernel(
    x_ptr, factor_ptr, out_ptr, rows, n, columns, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (tile of rows, tile of channels)."""
    program = tl.program_id(0)
    row = (program // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % columns) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows) & (column < n)[None, :]
    x = tl.load(x_ptr + row * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + column, mask=column < n, other=0.0)
    tl.store(out_ptr + row * n + column[None, :], cast(x * factor[None, :], out_ptr.dtype.element_ty), mask=inside)


def scale_channels_triton(out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, x_stride: int) -> None:
    """Fills contiguous out [..., n]; rows of x are x_stride elements apart."""
    if out.numel() == 0:
        return
    n = out.shape[-1]
    rows = out.numel() // n
    ROWS, COLUMNS = tile_of(n)
    columns = triton.cdiv(n, COLUMNS)
    scale_channels_kernel[(triton.cdiv(rows, ROWS) * columns,)](
        *(x, factor, out, rows, n, columns, x_stride), ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS
    )
