"""3x3 convolutions of SD1.5 and DDPM, against torch and against oneDNN with weights that it packed beforehand."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case
from fastdiff.ops import conv2d
from fastdiff.ops.packing import pack_conv

# batch, channels in, channels out, height = width
SHAPES = (
    (2, 320, 320, 64),
    (2, 640, 320, 64),
    (2, 640, 640, 32),
    (2, 1280, 1280, 16),
    (2, 2560, 1280, 16),
    (2, 1280, 1280, 8),
    (1, 128, 128, 32),
    (1, 256, 256, 16),
    (8, 256, 256, 16),
)
# SDXL at 1024 pixels, its second level with the skipped image beside, and the deepest level of SD1.5
GPU_SHAPES = ((2, 320, 320, 128), (2, 640, 640, 64), (2, 1280, 1280, 32), (2, 2560, 1280, 32), (2, 1280, 1280, 8))
AROUND, ONE = [1, 1, 1, 1], [1, 1]


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Weights in the dtype of the data; float16 data meets float32 weights."""
    weights = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for B, C, N, size in shapes or SHAPES:
        x = torch.randn(B, size, size, C, device=device, dtype=dtype)
        weight = (torch.randn(N, C, 3, 3, device=device) / (3 * C**0.5)).to(weights)
        bias, packed = torch.randn(N, device=device), pack_conv(weight, (C,))
        ours = lambda a=(x, None, packed, N, 3, 1, AROUND, 1, bias, None, None, dtype): conv2d(*a)
        planes, last = x.permute(0, 3, 1, 2), weight.to(dtype).contiguous(memory_format=torch.channels_last)
        plain = lambda x=planes, w=last, b=bias.to(dtype): F.conv2d(x, w, b, padding=1)
        contenders = {"fastdiff": ours, "torch": plain}
        if device == "cpu":
            contenders["onednn"] = onednn(planes, last, bias.to(dtype))
        else:
            contenders |= fused(x, packed, bias, plain)
        pixels = B * size * size
        traffic = x.nbytes + packed.nbytes + pixels * N * dtype.itemsize
        yield Case(f"{C} to {N} at {B} x {size}^2, {dtype}", contenders, traffic, 18 * pixels * C * N)


def fused(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, plain: Callable) -> dict[str, Callable]:
    """With the time embedding and the residual that a ResNet block adds."""
    emb = torch.randn(x.shape[0], len(bias), device=x.device)
    residual = torch.randn(*x.shape[:3], len(bias), device=x.device, dtype=x.dtype)
    args = (x, None, packed, len(bias), 3, 1, AROUND, 1, bias, emb, residual, x.dtype)
    columns, planes = emb.to(x.dtype)[:, :, None, None], residual.permute(0, 3, 1, 2)
    return {"fastdiff, fused": lambda: conv2d(*args), "torch, fused": lambda: plain() + columns + planes}


def onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same through oneDNN, with its own layout of the weights."""
    library = torch.ops.mkldnn
    packed = library._reorder_convolution_weight(weight, ONE, ONE, ONE, 1, list(x.shape))
    return lambda: library._convolution_pointwise(x, packed, bias, ONE, ONE, ONE, 1, "none", [], "")
