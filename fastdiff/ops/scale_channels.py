"""Channels times factors: what smoothing leaves to do where no norm can take it up."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, result_dtype
from fastdiff.ops.registry import op
from fastdiff.ops.rows import row_stride


def _check(x: torch.Tensor, factor: torch.Tensor, out_dtype: torch.dtype) -> None:
    if x.dtype not in FLOATS or out_dtype not in FLOATS or x.dim() == 0:
        raise TypeError(
            f"scale_channels: x [..., K] and out_dtype must be float32, bfloat16 or float16, got {x.dtype} {list(x.shape)} "
            f"and {out_dtype}"
        )
    if factor.dtype != torch.float32 or factor.shape != x.shape[-1:] or not factor.is_contiguous():
        raise ValueError(
            f"scale_channels: factor must be contiguous float32 [{x.shape[-1]}], got {factor.dtype} {list(factor.shape)}"
        )


@op(check=_check)
def scale_channels(x: torch.Tensor, factor: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Multiplies every channel by its factor, in float32.

    x       [..., K] float32, bfloat16 or float16; K contiguous, rows evenly spaced
    factor  [K] float32
    out     [..., K] out_dtype
    """
    wide = result_dtype(x, torch.float32)
    return (x.to(wide) * factor.to(wide)).to(result_dtype(x, out_dtype)).contiguous()


def _refuse(x: torch.Tensor, *rest) -> str | None:
    return None if row_stride(x) is not None else "rows must be evenly spaced and their elements contiguous"


@scale_channels.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, factor, out_dtype):
    out, codes = memory.empty(x.shape, out_dtype), native.TYPE_CODES
    if out.numel():
        native.cpu().scale_channels(
            out.data_ptr(), codes[out_dtype], x.data_ptr(), codes[x.dtype], x.shape[:-1].numel(), x.shape[-1],
            row_stride(x), factor.data_ptr(),
        )  # fmt: skip
    return out


@scale_channels.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x, factor, out_dtype):
    from fastdiff.kernels.scale_channels import scale_channels_triton

    out = memory.empty(x.shape, out_dtype, x.device)
    scale_channels_triton(out, x, factor, row_stride(x))
    return out


@scale_channels.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    for shape in ((1,), (3, 1), (5, 16), (2, 3, 33), (2, 257), (2, 0), (0, 5)):
        yield normal(*shape), normal(shape[-1]), torch.float32
    for dtype in FLOATS:
        for out in FLOATS:
            yield (10 * normal(3, 5, 96)).to(dtype)[..., 32:67], normal(35), out
    yield normal(2, 3, 5).transpose(1, 2), normal(3), torch.float32  # the reference serves it
    special = torch.tensor([[torch.nan, torch.inf, 1e38, 1e-40]], device=device)
    yield special, torch.full((4,), 10.0, device=device), torch.float32
