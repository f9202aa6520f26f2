"""Layout changes and casts, against torch's contiguous copies."""

import math
from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import copy

SHAPES = ((2, 4, 64, 64), (2, 320, 64, 64), (2, 1280, 16, 16), (2, 960, 128, 128))
GPU_SHAPES = ((2, 320, 128, 128), (2, 1280, 32, 32))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """NCHW to NHWC, back, and a plain cast to bfloat16."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        views = {"NHWC": x.permute(0, 2, 3, 1), "NCHW": x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)}
        for layout, view in views.items():
            out = torch.empty(view.shape, dtype=dtype, device=device)
            contenders = {
                "fastdiff": lambda view=view: copy(view, view.dtype),
                "torch": lambda view=view: view.contiguous(),
                "torch out=": lambda view=view, out=out: out.copy_(view),
            }
            yield Case(f"{layout} of {shape}", contenders, 2 * x.nbytes)
        contenders = {
            "fastdiff": lambda x=x: copy(x, torch.bfloat16),
            "torch": lambda x=x: x.to(torch.bfloat16, copy=True),
        }
        yield Case(f"cast {shape}", contenders, x.nbytes + 2 * math.prod(shape))
