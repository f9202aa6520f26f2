"""Attention with its log-sum-exp, against torch's scaled_dot_product_attention, which keeps its own to itself."""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import Case
from fastdiff.ops import attention_lse

SHAPES = ((2, 8, 1024, 80, 1024), (2, 16, 256, 72, 256))
GPU_SHAPES = ((2, 8, 4096, 40, 4096), (1, 24, 4608, 128, 4608))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """`shapes` as in bench/cases/attention.py."""
    for shape in shapes or SHAPES:
        B, H, N, D, M = shape if len(shape) == 5 else (*shape, shape[2])
        inputs = tuple(torch.randn(B, tokens, H, D, device=device, dtype=dtype) for tokens in (N, M, M))
        turned = tuple(x.transpose(1, 2) for x in inputs)
        precision = "f32" if dtype == torch.float32 else "bf16"
        ours = lambda inputs=inputs, D=D, precision=precision: attention_lse(*inputs, None, None, D**-0.5, precision)
        peer = lambda turned=turned: scaled_dot_product_attention(*turned)
        nbytes = sum(x.nbytes for x in inputs) + inputs[0].nbytes
        yield Case(f"{(B, H, N, D)} x {M} keys", {"fastdiff": ours, "torch": peer}, nbytes)
