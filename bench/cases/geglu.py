"""GEGLU, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import geglu

SHAPES = ((2, 256, 10240), (2, 1024, 5120), (2, 4096, 2560))
GPU_SHAPES = ((2, 1024, 10240), (2, 4096, 5120))


def _plain(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """The hidden layers of the transformer blocks of a UNet; shapes are of the input."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda x=x: geglu(x, "geglu"),
            "torch": lambda x=x: _plain(x),
            "torch.compile": lambda x=x, f=torch.compile(_plain): f(x),
        }
        yield Case(f"{shape}", contenders, x.nbytes * 3 // 2)
