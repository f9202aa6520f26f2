"""Channels times factors, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import scale_channels

SHAPES = ((512, 384), (4096, 320), (512, 1152))
GPU_SHAPES = ((4608, 3072), (8192, 640))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Activations in front of a smoothed linear layer."""
    for shape in shapes or SHAPES:
        x, factor = torch.randn(shape, device=device, dtype=dtype), torch.rand(shape[1], device=device)
        contenders = {
            "fastdiff": lambda x=x, f=factor: scale_channels(x, f, x.dtype),
            "torch": lambda x=x, f=factor: _plain(x, f),
            "torch.compile": lambda x=x, f=factor, run=torch.compile(_plain): run(x, f),
        }
        yield Case(f"{shape}", contenders, 2 * x.nbytes)


def _plain(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x.float() * factor).to(x.dtype)
