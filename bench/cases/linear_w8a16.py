"""Linear layers on int8 weights and float data, against torch on the full weight."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.cases.linear import CODED_SHAPES, SHAPES, label, traffic
from fastdiff.ops import linear_w8a16
from fastdiff.ops.linear_w8a8 import quantized

GPU_SHAPES = CODED_SHAPES


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """The layers of `linear`; torch multiplies in the dtype of the data."""
    for M, K, N in shapes or SHAPES:
        x = torch.randn(M, K, device=device, dtype=dtype)
        weight, bias = torch.randn(N, K, device=device) / K**0.5, torch.randn(N, device=device)
        packed = quantized(weight)[:2]
        ours = lambda a=(x, *packed, N, bias, "none", None, None, dtype): linear_w8a16(*a)
        plain = lambda x=x, w=weight.to(dtype), b=bias.to(dtype): F.linear(x, w, b)
        yield Case(label(M, K, N, dtype), {"fastdiff": ours, "torch": plain}, traffic(x, packed[0], N), 2 * M * K * N)
