"""Doubling and halving of NHWC images, against torch on channels_last tensors."""

from collections.abc import Iterator

import torch

from bench.cases import Case
from fastdiff.ops import resample

SHAPES = ((2, 320, 32, 32), (2, 1280, 16, 16))
GPU_SHAPES = ((2, 640, 64, 64),)


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Shapes are [B, C, H, W] whose channels lie last in memory."""
    functional = torch.nn.functional
    peers = {
        "nearest2x": (lambda x: functional.interpolate(x, scale_factor=2.0), 5),
        "average2x": (lambda x: functional.avg_pool2d(x, 2), 1.25),
    }
    for shape in shapes or SHAPES:
        x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for kind, (peer, share) in peers.items():
            contenders = {
                "fastdiff": lambda x=x.permute(0, 2, 3, 1), kind=kind: resample(x, kind),
                "torch": lambda x=x, peer=peer: peer(x),
            }
            yield Case(f"{kind} {shape}", contenders, int(share * x.nbytes))
