"""Gated residual addition, LayerNorm and modulation, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from bench.cases.norm_modulate import GPU_SHAPES, SHAPES, plain
from fastdiff.ops import gated_norm_modulate

__all__ = ["GPU_SHAPES", "SHAPES", "cases"]


def _plain(x, y, gate, shift, scale):
    total = x + gate[:, None] * y
    return total, plain(total, shift, scale)


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Two tensors read, two written."""
    for shape in shapes or SHAPES:
        x, y = torch.randn(2, *shape, device=device, dtype=dtype)
        gate, shift, scale = torch.randn(3, shape[0], shape[2], device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda a=(x, y, gate), b=(shift, scale): gated_norm_modulate(
                *a, "layer", None, None, 1e-6, *b, a[0].dtype
            ),
            "torch": lambda a=(x, y, gate, shift, scale): _plain(*a),
            "torch.compile": lambda a=(x, y, gate, shift, scale), f=torch.compile(_plain): f(*a),
        }
        yield Case(f"{shape}", contenders, 4 * x.nbytes)
