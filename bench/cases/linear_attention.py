"""Attention without a softmax, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import linear_attention

SHAPES = ((2, 1024, 70, 32), (1, 4096, 36, 32))  # Sana of 1.6 and 0.6 billion parameters
GPU_SHAPES = ((2, 1024, 70, 32), (2, 16384, 70, 32))  # at 1024 and 4096 pixels


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k = q.relu(), k.relu()
    products = torch.einsum("bmhi,bmhj->bhij", k, v)
    return torch.einsum("bnhi,bhij->bnhj", q, products) / torch.einsum("bnhi,bhi->bnh", q, k.sum(1)).unsqueeze(-1)


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """[B, N, H, D] out of a [B, N, 3, H, D] projection."""
    for B, N, H, D in shapes or SHAPES:
        qkv = torch.randn(B, N, 3, H, D, device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda a=qkv.unbind(2): linear_attention(*a, 1e-15),
            "torch": lambda a=qkv.unbind(2): _plain(*a),
            "torch.compile": lambda a=qkv.unbind(2), f=torch.compile(_plain): f(*a),
        }
        yield Case(f"{(B, N, H, D)}", contenders, qkv.nbytes * 4 // 3)
