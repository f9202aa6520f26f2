"""Static int8 quantization with one scale and offset per sample, against eager torch and torch.compile."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import quantize_static

SHAPES = ((2, 256, 384), (8, 1024, 128), (1, 4096, 320))
GPU_SHAPES = ((2, 16384, 320), (2, 1024, 1280))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Feature maps in front of a convolution whose ranges are known for each step."""
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype)
        scale = torch.full((shape[0],), 0.03, device=device)
        plain = quantize_static.reference
        contenders = {
            "fastdiff": lambda x=x, s=scale: quantize_static(x, s, s.round(), 4),
            "torch": lambda x=x, s=scale, plain=plain: plain(x, s, s.round(), 4),
            "torch.compile": lambda x=x, s=scale, f=torch.compile(plain): f(x, s, s.round(), 4),
        }
        yield Case(f"{shape}", contenders, x.nbytes + x.numel())
