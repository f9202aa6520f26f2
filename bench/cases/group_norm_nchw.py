"""GroupNorm with SiLU, channels first, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from bench.cases.group_norm import SHAPES, plain
from fastdiff.ops import group_norm_nchw


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Contiguous [B, C, H, W]."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        weight, bias = torch.randn(2, shape[1], device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda x=x, w=weight, b=bias: group_norm_nchw(
                x, 32, w, b, 1e-5, "silu", None, None, None, x.dtype
            ),
            "torch": lambda x=x, w=weight, b=bias: plain(x, w, b),
            "torch.compile": lambda x=x, w=weight, b=bias, f=torch.compile(plain): f(x, w, b),
        }
        yield Case(f"{shape}", contenders, 2 * x.nbytes)
