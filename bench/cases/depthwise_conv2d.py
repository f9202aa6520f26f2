"""Depthwise convolution with its gate, against eager torch in channels-last and torch.compile."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case
from fastdiff.ops import depthwise_conv2d

SHAPES = ((2, 32, 32, 11200), (1, 32, 32, 5760))  # Sana of 1.6 and 0.6 billion parameters
GPU_SHAPES = ((2, 32, 32, 11200), (2, 128, 128, 11200))  # at 1024 and 4096 pixels


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    value, gate = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[3]).chunk(2, dim=1)
    return value * F.silu(gate)


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """[B, H, W, C] to C / 2 channels."""
    for shape in shapes or SHAPES:
        C = shape[3]
        x = torch.randn(shape, device=device, dtype=dtype)
        weight, bias = torch.randn(C, 1, 3, 3, device=device), torch.randn(C, device=device)
        taps, plain = weight.flatten(1).T.contiguous(), (x, weight.to(dtype), bias.to(dtype))
        contenders = {
            "fastdiff": lambda a=(x, taps, bias): depthwise_conv2d(*a, "swiglu", a[0].dtype),
            "torch": lambda a=plain: _plain(*a),
            "torch.compile": lambda a=plain, f=torch.compile(_plain): f(*a),
        }
        yield Case(f"{shape}", contenders, x.nbytes * 3 // 2)
