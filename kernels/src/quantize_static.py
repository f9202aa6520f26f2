"""`quantize_static` in Triton: contract in `fastdiff/ops/quantize_static.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import rint
from fastdiff.kernels.row_blocks import tile_of

OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["rows", "columns", "share"])
def quantize_static_kernel(
    x_ptr,
    scale_ptr,
    offset_ptr,
    codes_ptr,
    rows,
    n,
    width,
    columns,
    share,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (tile of rows, tile of codes); `share` rows have one scale, and rows have width - n codes behind the n."""
    program = tl.program_id(0)
    row = (program // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % columns) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists, at = row < rows, row[:, None]
    one = tl.full((ROWS,), 1.0, tl.float32)
    inverse = tl.div_rn(one, tl.load(scale_ptr + row // share, mask=exists, other=1.0))[:, None]
    x = tl.load(x_ptr + at * x_stride + column, mask=exists[:, None] & (column < n), other=0.0).to(tl.float32)
    y = x * inverse
    # with an offset up to 127, what is beyond 255 is beyond the codes; clamped, it is not contracted with rint's addition
    codes = rint(tl.minimum(tl.maximum(y, -255.0), 255.0))
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + row // share, mask=exists, other=0.0)[:, None]
        codes = tl.where(column < n, codes + offset, -offset)
    codes = tl.where(y == y, tl.minimum(tl.maximum(codes, -127.0), 127.0), 0.0)
    tl.store(codes_ptr + at * width + column, codes.to(tl.int8), mask=exists[:, None] & (column < width))


def quantize_static_triton(
    codes: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, x_stride: int
) -> None:
    """Fills contiguous codes [..., n + tail] from x [..., n], whose rows are x_stride elements apart."""
    if codes.numel() == 0:
        return
    n, width = x.shape[-1], codes.shape[-1]
    rows = codes.numel() // width
    ROWS, COLUMNS = tile_of(width)
    columns = triton.cdiv(width, COLUMNS)
    quantize_static_kernel[(triton.cdiv(rows, ROWS) * columns,)](
        *(x, scale, offset, codes, rows, n, width, columns, rows // scale.numel(), x_stride),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        **OPTIONS,
    )
