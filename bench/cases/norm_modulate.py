"""LayerNorm with modulation, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import norm_modulate

SHAPES = ((2, 256, 384), (2, 256, 1152), (1, 4608, 3072), (2, 256, 256))
# DiT-XL/2 at 512 pixels, SD3-medium, FLUX, Wan 1.3B
GPU_SHAPES = ((2, 1024, 1152), (2, 4429, 1536), (1, 4608, 3072), (1, 32760, 1536))


def plain(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a transformer block of diffusers does."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """[B, N, C] with shift and scale from a [B, 6 C] projection."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        six = torch.randn(shape[0], 6 * shape[2], device=device, dtype=dtype)
        shift, scale = six[:, : shape[2]], six[:, shape[2] : 2 * shape[2]]
        contenders = {
            "fastdiff": lambda x=x, b=shift, s=scale: norm_modulate(x, "layer", None, None, 1e-6, b, s, x.dtype),
            "torch": lambda x=x, b=shift, s=scale: plain(x, b, s),
            "torch.compile": lambda x=x, b=shift, s=scale, f=torch.compile(plain): f(x, b, s),
        }
        yield Case(f"{shape}", contenders, 2 * x.nbytes)
