"""int8 codes with one scale per row: dynamic quantization of activations."""

import math

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS
from fastdiff.ops.registry import op
from fastdiff.ops.rows import row_stride

_ONE_127TH = float(torch.tensor(1.0) / 127)  # as float32


def _check(x: torch.Tensor) -> None:
    if x.dtype not in FLOATS or x.dim() == 0:
        raise TypeError(
            f"quantize_rows: x must be [..., K] float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}"
        )


@op(check=_check)
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes each row symmetrically with its own scale.

    x       [..., K] float32, bfloat16 or float16; K contiguous, rows evenly spaced
    codes   [..., K] int8 in [-127, 127]: x / scale rounded to nearest even
    scales  [...] float32: largest magnitude / 127

    float32 with one fixed sequence of operations: scale = amax * (1/127), code = rint(x * (127 / amax)), equal on every
    backend. A row of zeros has scale 0. A row with a NaN or an infinity has scale NaN and codes 0. K = 0 gives scale 0.
    """
    return row_codes(x)


def row_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows, always in float32."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    largest = torch.where(largest < math.inf, largest, math.nan)  # NaN compares as false
    inverse = torch.where(
        largest == 0, 0.0, torch.full_like(largest, 127) / largest
    )  # 127 / largest multiplies a reciprocal
    codes = torch.round(x * inverse).clamp(-127, 127).nan_to_num(0.0).to(torch.int8)
    return codes.contiguous(), (largest * _ONE_127TH).squeeze(-1).contiguous()


def _refuse(x: torch.Tensor) -> str | None:
    return None if row_stride(x) is not None else "rows must be evenly spaced and their elements contiguous"


@quantize_rows.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x):
    *outer, K = x.shape
    codes, scales = memory.empty(x.shape, torch.int8), memory.empty(outer, torch.float32)
    if scales.numel():
        native.cpu().quantize_rows(
            codes.data_ptr(),
            scales.data_ptr(),
            x.data_ptr(),
            native.TYPE_CODES[x.dtype],
            math.prod(outer),
            K,
            row_stride(x),
        )
    return codes, scales


@quantize_rows.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x):
    from fastdiff.kernels.quantize_rows import quantize_rows_triton

    codes = memory.empty(x.shape, torch.int8, x.device)
    scales = memory.empty(x.shape[:-1], torch.float32, x.device)
    quantize_rows_triton(codes, scales, x, row_stride(x))
    return codes, scales


@quantize_rows.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    for shape in ((1,), (3, 1), (2, 7), (5, 16), (2, 3, 33), (4, 64), (1, 257), (2, 0), (0, 5), (2, 3001)):
        yield (normal(*shape),)
    for dtype in FLOATS:
        yield ((10 * normal(3, 5, 96)).to(dtype)[..., 32:67],)
        yield (normal(2, 3, 5).to(dtype).transpose(1, 2),)  # the reference serves it
    special = normal(6, 20)
    special[0] = 0
    special[1, 19], special[2, 0], special[3, 5] = torch.nan, torch.inf, -torch.inf
    special[4] *= 1e38
    special[5] *= 1e-40
    yield (special,)
    yield (torch.arange(-254, 255, device=device)[None] / 2,)  # ties
