"""Keys of two streams as one tensor, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import join_heads

SHAPES = ((2, 77, 256, 24, 64), (1, 512, 4096, 24, 128))
GPU_SHAPES = ((2, 333, 4096, 24, 64), (1, 512, 4096, 24, 128))


def _plain(first, second, weight, cos, sin):
    norm = lambda x: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
    y = torch.cat([norm(first), norm(second)], dim=1)
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
    return y * cos[:, None] + torch.stack([-b, a], dim=-1).flatten(-2) * sin[:, None]


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """[B, N, H, D] and [B, M, H, D] out of projections [B, N, 3, H, D]."""
    for B, N, M, H, D in shapes or SHAPES:
        normal = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
        first, second = normal(B, N, 3, H, D)[:, :, 1], normal(B, M, 3, H, D)[:, :, 1]
        angle = torch.randn(N + M, D, device=device)
        args = (first, second, normal(D), angle.cos().to(dtype), angle.sin().to(dtype))
        contenders = {
            "fastdiff": lambda a=args: join_heads(a[0], a[1], a[2], a[2], 1e-6, a[3], a[4], a[0].dtype),
            "torch": lambda a=args: _plain(*a),
            "torch.compile": lambda a=args, f=torch.compile(_plain): f(*a),
        }
        yield Case(f"{(B, N, M, H, D)}", contenders, 2 * (first.numel() + second.numel()) * first.element_size())
