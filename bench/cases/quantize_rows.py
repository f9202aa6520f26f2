"""Dynamic int8 quantization of rows, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import quantize_rows
from fastdiff.ops.quantize_rows import row_codes

SHAPES = ((512, 384), (512, 1152), (4096, 1280), (4608, 12288))
GPU_SHAPES = ((4608, 3072), (4608, 12288))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Activations in front of a linear layer."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda x=x: quantize_rows(x),
            "torch": lambda x=x: row_codes(x),
            "torch.compile": lambda x=x, f=torch.compile(row_codes): f(x),
        }
        yield Case(f"{shape}", contenders, x.nbytes + x.numel())
