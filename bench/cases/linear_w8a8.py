"""Linear layers on int8 with rows quantized on the way in, against torch._int_mm and oneDNN on codes that are given."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case
from bench.cases import linear as floats
from bench.cases.linear import SHAPES, label, traffic
from fastdiff.ops import linear_w8a8
from fastdiff.ops.linear_w8a8 import quantized
from fastdiff.ops.packing import unpack

GPU_SHAPES = floats.GPU_SHAPES


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """`codes` is our kernel on given codes with codes as its result: what oneDNN is asked for."""
    for M, K, N in shapes or SHAPES:
        x = torch.randn(M, K, device=device, dtype=dtype)
        packed, scale, sums = quantized(torch.randn(N, K, device=device) / K**0.5)
        bias, one, out = (
            torch.randn(N, device=device),
            torch.full((1,), 0.03, device=device),
            torch.ones(1, device=device),
        )
        codes = torch.round(x.float() / 0.03).clamp(-127, 127).to(torch.int8)
        rest = (packed, scale, sums, N, bias, "none", None, None)
        weight = unpack(packed, N, K)
        contenders = {
            "fastdiff": lambda a=(x, None, *rest, None, dtype): linear_w8a8(*a),
            "codes": lambda a=(codes, one, *rest, out, torch.int8): linear_w8a8(*a),
            "torch": lambda x=codes, w=weight.T if device == "cuda" else weight.T.contiguous(): torch._int_mm(x, w),
        }
        if M <= 16 and device == "cuda":
            del contenders["torch"]  # its kernel wants more than 16 rows
        if device == "cuda":
            wide = (weight.float() * scale[:, None]).to(dtype)
            contenders["torch in the data's type"] = lambda x=x, w=wide, b=bias.to(dtype): F.linear(x, w, b)
        if device == "cpu":
            contenders["onednn"] = onednn(codes, weight, scale, bias)
        yield Case(label(M, K, N, dtype), contenders, traffic(x, packed, N), 2 * M * K * N)


def onednn(codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> Callable[[], object]:
    """The same through oneDNN, from unsigned codes to unsigned codes."""
    library = torch.ops.onednn
    x, zero = (codes.int() + 128).to(torch.uint8), torch.zeros(len(scale), dtype=torch.int32)
    packed = library.qlinear_prepack(weight.contiguous(), None)
    arguments = (x, 0.03, 128, packed, scale, zero, bias, 1.0, 128, torch.uint8, "none", [], "")
    return lambda: library.qlinear_pointwise(*arguments)
