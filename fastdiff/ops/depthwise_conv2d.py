"""A 3 x 3 convolution of every channel by itself, and the gate that follows it in Sana's feed-forward layers."""

import torch
import torch.nn.functional as F

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, result_dtype, widen
from fastdiff.ops.registry import op

ACTIVATIONS = ("none", "swiglu")


def _check(x, weight, bias, activation, out_dtype) -> None:
    if x.dim() != 4 or x.dtype not in FLOATS or out_dtype not in FLOATS:
        raise TypeError(
            f"depthwise_conv2d: x and out must be floats [B, H, W, C], got {x.dtype} {list(x.shape)} and {out_dtype}"
        )
    C = x.shape[3]
    if activation not in ACTIVATIONS or activation == "swiglu" and C % 2:
        raise ValueError(f"depthwise_conv2d: activation must be none, or swiglu of an even C, got {activation!r}, {C}")
    for name, value, shape in (("weight", weight, (9, C)), ("bias", bias, (C,))):
        if value is not None and (value.shape != shape or value.dtype != torch.float32 or not value.is_contiguous()):
            raise ValueError(
                f"depthwise_conv2d: {name} must be contiguous float32 {list(shape)}, got {value.dtype} {list(value.shape)}"
            )


@op(check=_check)
def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, out_dtype: torch.dtype
) -> torch.Tensor:
    """Convolves each channel of a feature map with 3 x 3 weights of its own; a border of zeros keeps the size.

    x           [B, H, W, C] float32, bfloat16 or float16
    weight      [9, C] float32: rows of the kernel one after another, `w.flatten(1).T` of torch's [C, 1, 3, 3]
    bias        [C] float32, or None
    activation  "none", or "swiglu": of the C channels, the first half times silu(the second half)
    out         [B, H, W, C] out_dtype (C / 2 with swiglu)

    float32 arithmetic.
    """
    wide, weight, bias = widen(x, weight, bias)
    kernel = weight.T.unflatten(1, (1, 3, 3)).to(wide.dtype)
    bias = None if bias is None else bias.to(wide.dtype)
    y = F.conv2d(wide.permute(0, 3, 1, 2), kernel, bias, padding=1, groups=x.shape[3]).permute(0, 2, 3, 1)
    if activation == "swiglu":
        value, gate = y.chunk(2, dim=3)
        y = value * F.silu(gate)
    return y.to(result_dtype(x, out_dtype)).contiguous()


def _refuse(x: torch.Tensor, *rest) -> str | None:
    return None if x.is_contiguous() else "x must be contiguous"


@depthwise_conv2d.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, weight, bias, activation, out_dtype):
    gated = activation == "swiglu"
    out = memory.empty((*x.shape[:3], x.shape[3] // 2 if gated else x.shape[3]), out_dtype)
    if out.numel():
        native.cpu().depthwise_conv2d(
            *(out.data_ptr(), native.TYPE_CODES[out_dtype], x.data_ptr(), native.TYPE_CODES[x.dtype]),
            *(weight.data_ptr(), 0 if bias is None else bias.data_ptr(), gated, *x.shape),
        )
    return out


@depthwise_conv2d.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x, weight, bias, activation, out_dtype):
    from fastdiff.kernels.depthwise_conv2d import depthwise_conv2d_triton

    gated = activation == "swiglu"
    out = memory.empty((*x.shape[:3], x.shape[3] // 2 if gated else x.shape[3]), out_dtype, x.device)
    depthwise_conv2d_triton(out, x, weight, bias, gated)
    return out


@depthwise_conv2d.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    for shape in ((1, 1, 1, 2), (2, 3, 5, 34), (1, 7, 2, 16), (1, 2, 70, 8), (2, 4, 4, 300), (0, 2, 2, 4)):
        for activation in ACTIVATIONS:
            yield normal(*shape), normal(9, shape[3]), normal(shape[3]), activation, torch.float32
    for dtype in FLOATS:
        yield normal(1, 5, 6, 66).to(dtype), normal(9, 66), None, "swiglu", dtype
        yield normal(1, 5, 6, 66).to(dtype), normal(9, 66), None, "none", torch.bfloat16
    yield normal(1, 6, 4, 8).permute(0, 2, 1, 3), normal(9, 8), normal(8), "none", torch.float32
    bad = normal(1, 5, 5, 20)
    bad[0, 1, 1, 3], bad[0, 4, 4, 19] = torch.nan, torch.inf
    for activation in ACTIVATIONS:
        yield bad, normal(9, 20), None, activation, torch.float32
