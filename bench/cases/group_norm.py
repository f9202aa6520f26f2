"""GroupNorm with SiLU, channels last, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import group_norm

SHAPES = ((2, 320, 64, 64), (2, 960, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (1, 128, 32, 32), (2, 32, 32, 32))
# Stable Diffusion XL at 1024 pixels, 1.5 at 512, 20 frames of 256 pixels in a video decoder
GPU_SHAPES = ((2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32), (2, 1280, 16, 16), (1, 128, 5120, 256))


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What a ResNet block of diffusers does."""
    return torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, weight, bias, 1e-5))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Shapes are [B, C, H, W] whose channels lie last in memory."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        rows = x.permute(0, 2, 3, 1)
        weight, bias = torch.randn(2, shape[1], device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda x=rows, w=weight, b=bias: group_norm(
                x, None, 32, w, b, 1e-5, "silu", None, None, None, x.dtype
            ),
            "torch": lambda x=x, w=weight, b=bias: plain(x, w, b),
            "torch.compile": lambda x=x, w=weight, b=bias, f=torch.compile(plain): f(x, w, b),
        }
        yield Case(f"{shape}", contenders, 2 * x.nbytes)
