"""Norm and rotation of queries, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import qk_norm_rope

SHAPES = ((1, 1024, 24, 64), (1, 4608, 24, 128))
GPU_SHAPES = ((1, 4608, 24, 128), (1, 32760, 12, 128))


def _plain(x, weight, cos, sin):
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
    return y * cos[:, None] + torch.stack([-b, a], dim=-1).flatten(-2) * sin[:, None]


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """[B, N, H, D] out of a [B, N, 3, H, D] projection."""
    for B, N, H, D in shapes or SHAPES:
        x = torch.randn(B, N, 3, H, D, device=device, dtype=dtype)[:, :, 0]
        weight, angle = torch.randn(D, device=device, dtype=dtype), torch.randn(N, D, device=device)
        args = (x, weight, angle.cos().to(dtype), angle.sin().to(dtype))
        contenders = {
            "fastdiff": lambda a=args: qk_norm_rope(a[0], a[1], 1e-6, a[2], a[3], True, a[0].dtype),
            "torch": lambda a=args: _plain(*a),
            "torch.compile": lambda a=args, f=torch.compile(_plain): f(*a),
        }
        yield Case(f"{(B, N, H, D)}", contenders, 2 * x.numel() * x.element_size())
