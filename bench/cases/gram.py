"""Per-sample inner products, against the batched matrix product of torch."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import gram

SHAPES = ((2, 4, 64, 64), (1, 16, 128, 128), (1, 16, 21, 90, 160))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Three operands: what guidance rescaling and projections need."""
    for shape in shapes or SHAPES:
        operands = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]

        def bmm(operands=operands):
            rows = torch.stack([v.flatten(1) for v in operands], dim=1)
            return rows @ rows.transpose(1, 2), rows.sum(2)

        ours = lambda operands=operands: gram(operands)
        yield Case(f"3 x {shape}", {"fastdiff": ours, "torch": bmm}, sum(v.nbytes for v in operands))
