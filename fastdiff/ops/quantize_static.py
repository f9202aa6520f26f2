"""int8 codes with scales that are known before: static quantization of activations, symmetric or with an offset."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS
from fastdiff.ops.registry import op
from fastdiff.ops.rows import row_stride


def _check(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, tail: int) -> None:
    if x.dtype not in FLOATS or x.dim() < 2:
        raise TypeError(
            f"quantize_static: x must be [B, ..., K] float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}"
        )
    for name, value in (("scale", scale), ("offset", offset)):
        if value is None:
            continue
        if value.dtype != torch.float32 or value.shape not in ((1,), (x.shape[0],)) or not value.is_contiguous():
            raise ValueError(
                f"quantize_static: {name} must be contiguous float32 [1] or [{x.shape[0]}], "
                f"got {value.dtype} {list(value.shape)}"
            )
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"quantize_static: offset must be like scale, {list(scale.shape)}, got {list(offset.shape)}")
    if tail < 0:
        raise ValueError(f"quantize_static: tail must be >= 0, got {tail}")


@op(check=_check)
def quantize_static(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, tail: int) -> torch.Tensor:
    """Quantizes with given scales, one for all samples or one each: x = scale * (code - offset).

    x       [B, ..., K] float32, bfloat16 or float16; K contiguous, rows evenly spaced
    scale   [1] or [B] float32, positive
    offset  like scale, whole numbers from -127 to 127, or None for a symmetric range
    tail    codes that follow each row; all are -offset
    codes   [B, ..., K + tail] int8 in [-127, 127]: rint(x * (1 / scale)) + offset, limited; NaN gives 0

    An offset in a product: sum of w * (code - offset) is sum of w * code, plus -offset * sum of w. The tail holds that
    -offset where the product finds codes that add up to the sum of w, and zero outside of a convolution's image.
    """
    over = lambda v: v.view(-1, *[1] * (x.dim() - 1))
    shift = torch.zeros_like(scale) if offset is None else offset
    codes = torch.round(x.float() * (1 / over(scale))) + over(shift)
    codes = codes.clamp(-127, 127).nan_to_num(0.0)
    last = over(-shift).expand(*x.shape[:-1], tail)
    return torch.cat([codes, last], dim=-1).to(torch.int8)


def _refuse(x: torch.Tensor, *rest) -> str | None:
    return None if row_stride(x) is not None else "rows must be evenly spaced and their elements contiguous"


@quantize_static.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, scale, offset, tail):
    *outer, K = x.shape
    codes = memory.empty((*outer, K + tail), torch.int8)
    rows = codes[..., 0].numel() if K + tail else 0
    if rows:
        native.cpu().quantize_static(
            codes.data_ptr(), tail, x.data_ptr(), native.TYPE_CODES[x.dtype], rows, K, row_stride(x),
            scale.data_ptr(), 0 if offset is None else offset.data_ptr(), rows // scale.numel(),
        )  # fmt: skip
    return codes


@quantize_static.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x, scale, offset, tail):
    from fastdiff.kernels.quantize_static import quantize_static_triton

    codes = memory.empty((*x.shape[:-1], x.shape[-1] + tail), torch.int8, x.device)
    quantize_static_triton(codes, x, scale, offset, row_stride(x))
    return codes


@quantize_static.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    scales = lambda n: torch.linspace(0.01, 0.05, n, device=device)
    offsets = lambda n: torch.linspace(-127, 127, n, device=device).round()
    for shape in ((1, 1), (3, 1), (2, 7), (5, 16), (2, 3, 33), (4, 5, 64), (3, 2, 2, 257), (2, 0), (0, 5), (2, 0, 4)):
        yield normal(*shape), scales(1), None, 0
        yield normal(*shape), scales(shape[0]), offsets(shape[0]), 3
    for dtype in FLOATS:
        yield (10 * normal(3, 5, 96)).to(dtype)[..., 32:67], scales(3), offsets(3), 1
        yield normal(2, 3, 5).to(dtype).transpose(1, 2), scales(1), None, 0  # the reference serves it
    special = normal(2, 20)
    special[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    yield special, scales(2), offsets(2), 4
    yield torch.arange(-255, 255, device=device)[None] / 2, torch.ones(1, device=device), None, 0  # ties
