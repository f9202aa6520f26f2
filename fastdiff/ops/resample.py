"""Doubling and halving of images whose channels come last."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, widen
from fastdiff.ops.registry import op

KINDS = ("nearest2x", "average2x")


def _check(x: torch.Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"resample: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if x.dim() != 4 or x.dtype not in FLOATS:
        raise ValueError(
            f"resample: x must be [B, H, W, C] float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}"
        )


@op(check=_check)
def resample(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Doubles or halves the height and width of NHWC images.

    x     [B, H, W, C] float32, bfloat16 or float16, contiguous
    kind  "nearest2x": every pixel four times; "average2x": the mean of two by two pixels, an odd last row or column
          left out (F.avg_pool2d(x, 2))
    out   [B, 2 H, 2 W, C] or [B, H // 2, W // 2, C], x.dtype; means in float32
    """
    if kind == "nearest2x":
        return x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    H, W = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    (wide,) = widen(x[:, :H, :W])
    pairs = wide[:, :, 0::2] + wide[:, :, 1::2]
    return ((pairs[:, 0::2] + pairs[:, 1::2]) * 0.25).to(x.dtype).contiguous()


def _refuse(x: torch.Tensor, kind: str) -> str | None:
    return None if x.is_contiguous() else "x must be contiguous"


@resample.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, kind):
    B, H, W, C = x.shape
    average = kind == "average2x"
    out = memory.empty((B, H // 2, W // 2, C) if average else (B, 2 * H, 2 * W, C), x.dtype)
    if out.numel():
        native.cpu().resample(out.data_ptr(), x.data_ptr(), native.TYPE_CODES[x.dtype], average, B, H, W, C)
    return out


@resample.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x, kind):
    from fastdiff.kernels.resample import resample_triton

    B, H, W, C = x.shape
    average = kind == "average2x"
    out = memory.empty((B, H // 2, W // 2, C) if average else (B, 2 * H, 2 * W, C), x.dtype, x.device)
    resample_triton(out, x, average)
    return out


@resample.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    for kind in KINDS:
        for shape in (
            (1, 2, 2, 1),
            (2, 5, 3, 4),
            (1, 4, 6, 17),
            (2, 3, 7, 33),
            (1, 1, 1, 8),
            (0, 2, 2, 3),
            (1, 2, 2, 0),
        ):
            yield torch.randn(shape, generator=generator).to(device), kind
        for dtype in FLOATS:
            x = torch.randn(2, 4, 5, 20, generator=generator).to(device, dtype)
            x[0, 0, 0, 0], x[0, 2, 1, 1] = torch.nan, torch.inf
            yield x, kind
    yield torch.randn(2, 4, 6, 5, generator=generator).to(device).permute(0, 2, 1, 3), "average2x"  # the reference's
