"""Attention in its three precisions, against torch's scaled_dot_product_attention."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import Case
from fastdiff.ops import attention

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# B, H, N, D, M: Stable Diffusion 1.5 at 64 x 64 and its text, FLUX, DiT-XL/2, DiT-S/2, and tiny ones
SHAPES = (
    *((2, 8, 4096, 40, 4096), (2, 8, 1024, 80, 1024), (2, 8, 256, 160, 256), (2, 8, 4096, 40, 77)),
    *(
        (1, 24, 4608, 128, 4608),
        (2, 16, 256, 72, 256),
        (2, 6, 256, 64, 256),
        (16, 8, 256, 64, 256),
        (1, 4, 49, 32, 49),
    ),
)
# DiT-XL/2, Stable Diffusion 1.5 and XL with their texts, SD3-medium, FLUX, Wan 1.3B with its text
GPU_SHAPES = (
    *((2, 16, 256, 72, 256), (2, 16, 1024, 72, 1024), (2, 8, 4096, 40, 4096), (2, 8, 4096, 40, 77)),
    *((2, 8, 1024, 80, 1024), (2, 8, 256, 160, 256), (2, 10, 4096, 64, 4096), (2, 20, 1024, 64, 1024)),
    *((2, 10, 4096, 64, 77), (2, 24, 4429, 64, 4429), (1, 24, 4608, 128, 4608)),
    *((1, 12, 32760, 128, 32760), (1, 12, 32760, 128, 512)),
)


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """`shapes` are (B, H, N, D) or (B, H, N, D, M). "fastdiff" is the precision that is as exact as torch is in `dtype`."""
    for shape in shapes or SHAPES:
        B, H, N, D, M = shape if len(shape) == 5 else (*shape, shape[2])
        inputs = tuple(torch.randn(B, tokens, H, D, device=device, dtype=dtype) for tokens in (N, M, M))
        exact = "f32" if dtype == torch.float32 else "bf16"
        contenders = {"fastdiff": _ours(inputs, exact)}
        contenders |= {f"fastdiff {name}": _ours(inputs, name) for name in ("bf16", "int8") if name != exact}
        contenders["torch"] = _torch(inputs)
        if dtype == torch.float32:
            contenders["torch bf16"] = _torch(tuple(x.bfloat16() for x in inputs))
        if device == "cuda":
            contenders |= {f"torch {b.name.lower()}": _torch(inputs, b) for b in BACKENDS}
        yield Case(
            f"{(B, H, N, D)} x {M} keys",
            contenders,
            sum(x.nbytes for x in inputs) + inputs[0].nbytes,
            4 * B * H * N * M * D,
        )


def _ours(inputs: tuple, precision: str) -> Callable[[], object]:
    return lambda: attention(*inputs, None, None, inputs[0].shape[3] ** -0.5, precision)


def _torch(inputs: tuple, kind: SDPBackend | None = None) -> Callable[[], object]:
    q, k, v = (x.transpose(1, 2) for x in inputs)

    def run() -> torch.Tensor:
        with sdpa_kernel(kind) if kind else contextlib.nullcontext():
            return scaled_dot_product_attention(q, k, v)

    return run
