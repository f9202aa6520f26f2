"""3x3 int8 convolutions of SD1.5 and DDPM, against oneDNN's on codes that somebody else has made."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.cases.conv2d import AROUND, GPU_SHAPES, ONE, SHAPES, onednn
from fastdiff.ops import conv2d_w8a8
from fastdiff.ops.packing import conv_weight_sums, pack_conv

__all__ = ["GPU_SHAPES", "SHAPES", "cases"]


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Data in `dtype`, quantized per sample in the call; `static` has the scales, `codes` int8 data. torch: in `dtype`."""
    for B, C, N, size in shapes or SHAPES:
        x = torch.randn(B, size, size, C, device=device, dtype=dtype)
        codes = torch.randint(-127, 128, (N, C, 3, 3), dtype=torch.int8, device=device)
        packed, sums = pack_conv(codes, (C,)), conv_weight_sums(codes, (C,))
        scale, bias = torch.full((N,), 0.01, device=device), torch.randn(N, device=device)
        rest = (packed, scale, sums, N, 3, 1, AROUND, 1, bias, None, None, None, dtype)
        step = torch.full((1,), 0.03, device=device)
        quantized = (x / step).round().clamp(-127, 127).to(torch.int8)
        contenders = {
            "fastdiff": lambda x=x, rest=rest: conv2d_w8a8(x, None, None, None, *rest),
            "fastdiff, static": lambda x=x, step=step, rest=rest: conv2d_w8a8(x, step, None, None, *rest),
            "fastdiff, codes": lambda x=quantized, step=step, rest=rest: conv2d_w8a8(x, step, None, None, *rest),
        }
        if device == "cpu":
            brains = codes.bfloat16().contiguous(memory_format=torch.channels_last)
            contenders["onednn"] = onednn_int8(quantized, codes, scale, bias)
            contenders["onednn bfloat16"] = onednn(x.bfloat16().permute(0, 3, 1, 2), brains, bias.bfloat16())
        else:
            planes, brains = x.permute(0, 3, 1, 2), codes.to(dtype).contiguous(memory_format=torch.channels_last)
            contenders["torch"] = lambda x=planes, w=brains, b=bias.to(dtype): F.conv2d(x, w, b, padding=1)
        pixels = B * size * size
        traffic = x.nbytes + packed.nbytes + pixels * N * dtype.itemsize
        yield Case(f"{C} to {N} at {B} x {size}^2, {dtype}", contenders, traffic, 18 * pixels * C * N)


def onednn_int8(x, codes, scale, bias) -> Callable[[], torch.Tensor]:
    """oneDNN's int8 convolution to float32, of int8 images that it gets as unsigned ones."""
    library, planes = torch.ops.onednn, (x.short() + 128).to(torch.uint8).permute(0, 3, 1, 2)
    packed = library.qconv_prepack(codes, scale, 0.03, 128, ONE, ONE, ONE, 1, list(planes.shape))
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    data = (planes, 0.03, 128, packed, scale, zeros, bias, ONE, ONE, ONE, 1)
    return lambda: library.qconv_pointwise(*data, 1.0, 0, torch.float32, "none", [], "")
