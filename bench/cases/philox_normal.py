"""Normal noise, against torch.randn."""

import math
from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import philox_normal

SIZES = ((2, 16384), (1, 262144), (1, 4838400))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Rows of the usual latents; the noise is float32 whatever the dtype of the model."""
    for rows, n in [(shape[0], math.prod(shape[1:])) for shape in shapes] or SIZES:
        seed = torch.arange(rows, device=device)
        step = torch.zeros(rows, dtype=torch.int32, device=device)
        ours = lambda key=(seed, step, step, n): philox_normal(*key)
        peer = lambda shape=(rows, n): torch.randn(shape, device=device)
        yield Case(f"({rows}, {n})", {"fastdiff": ours, "torch": peer}, 4 * rows * n)
