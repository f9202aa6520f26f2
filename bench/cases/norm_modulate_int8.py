"""LayerNorm with modulation and int8 codes, against eager torch doing the same."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from bench.cases.norm_modulate import GPU_SHAPES, SHAPES, plain
from fastdiff.ops import norm_modulate_int8
from fastdiff.ops.quantize_rows import row_codes

__all__ = ["GPU_SHAPES", "SHAPES", "cases"]


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """[B, N, C] with shift and scale; read once, an int8 written."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        shift, scale = torch.randn(2, shape[0], shape[2], device=device, dtype=dtype)
        contenders = {
            "fastdiff": lambda x=x, b=shift, s=scale: norm_modulate_int8(x, "layer", None, None, 1e-6, b, s),
            "torch": lambda x=x, b=shift, s=scale: row_codes(plain(x, b, s)),
        }
        yield Case(f"{shape}", contenders, x.nbytes + x.numel())
