"""GELU with tanh, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import activate

SHAPES = ((2, 256, 1024), (2, 256, 4608), (1, 4608, 12288))
GPU_SHAPES = ((2, 1024, 4608), (1, 4608, 12288))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """The hidden layer of a DiT's feed-forward network."""
    plain = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda x=x: activate(x, "gelu_tanh"),
            "torch": lambda x=x: plain(x),
            "torch.compile": lambda x=x, f=torch.compile(plain): f(x),
        }
        yield Case(f"{shape}", contenders, 2 * x.nbytes)
