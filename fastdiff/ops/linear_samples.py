"""Arguments that the tests and benchmarks of all linear layers iterate over."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastdiff.ops.linear_call import PAIRS
from fastdiff.ops.packing import interleave

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Sample:
    """A layer before its weight is packed: `weight` is [N, K], for pairs with its halves interleaved by 16."""

    x: torch.Tensor
    weight: torch.Tensor
    out_features: int
    bias: torch.Tensor | None
    activation: str
    gate: torch.Tensor | None
    residual: torch.Tensor | None
    out_dtype: torch.dtype


# rows, K, N, type of x, activation, what else: b(ias), g(ate), r(esidual), s(trided), n(ot a number), type of the result
_SHAPES = (
    ((3,), 7, 5, F32, "none", "", F32),
    ((1,), 1, 1, F32, "none", "b", F32),
    ((0,), 8, 16, F32, "gelu", "b", F32),
    ((2, 3), 12, 0, F32, "none", "", F32),
    ((2,), 0, 19, F32, "silu", "b", F32),
    ((2, 17), 33, 47, BF16, "gelu", "bgr", BF16),
    ((2, 13), 67, 70, F16, "silu", "bgs", F16),
    ((2, 15), 130, 64, F32, "gelu_tanh", "brs", BF16),
    ((31,), 257, 33, F32, "gelu", "b", F32),
    ((5,), 96, 40, F32, "geglu", "bg", F32),
    ((2, 2, 4), 40, 96, BF16, "geglu_tanh", "r", F32),
    ((16,), 31, 62, F16, "swiglu", "bs", F32),
    ((4, 71), 128, 144, F32, "none", "bgrs", F32),
    ((2, 61), 64, 96, BF16, "gelu_tanh", "bgr", BF16),
    ((130,), 36, 128, F32, "geglu", "bg", BF16),
    ((4,), 24, 17, F32, "none", "bn", F32),
)


def layouts(device: str) -> tuple[str, ...]:
    """What weights of samples are packed in: rows on every device, since Triton's interpreter runs on CPUs too."""
    return ("panels", "rows") if device == "cpu" else ("rows",)


def samples(device: str, group: int = 1) -> Iterator[Sample]:
    """Small layers of all kinds; K is rounded up to a multiple of `group`."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    for lead, K, N, dtype, activation, extras, out_dtype in _SHAPES:
        K = -(-K // group) * group
        columns = N // 2 if activation in PAIRS else N
        both = [(normal(columns, K) / max(K, 1) ** 0.5, normal(columns)) for _ in range(2)]
        weight, bias = (interleave(*pair) for pair in zip(*both, strict=True)) if activation in PAIRS else both[0]
        x = (normal(*lead, K + 9)[..., 4 : 4 + K] if "s" in extras else normal(*lead, K)).to(dtype)
        if "n" in extras:
            x[1, K // 2], x[2, 0] = torch.nan, torch.inf
        strided = normal(lead[0], 3 * columns)[:, columns : 2 * columns]
        residual = normal(*lead, columns + 3)[..., :columns] if "s" in extras else normal(*lead, columns)
        yield Sample(
            x.to(device),
            weight.to(device),
            N,
            bias.to(device) if "b" in extras else None,
            activation,
            strided.to(device, dtype if "s" in extras else F32) if "g" in extras else None,
            residual.to(device, dtype) if "r" in extras else None,
            out_dtype,
        )
