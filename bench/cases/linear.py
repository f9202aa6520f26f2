"""Linear layers of DiT-XL and SD1.5, against torch and against oneDNN with weights that it packed beforehand.

On a GPU also with all that can follow a product, against the same in torch.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case
from fastdiff.ops import linear
from fastdiff.ops.packing import pack

# M, K, N
SHAPES = (
    (2, 1152, 6912),
    (256, 1152, 1152),
    (256, 1152, 4608),
    (256, 4608, 1152),
    (512, 1152, 4608),
    (4096, 320, 320),
    (4096, 320, 2560),
    (4096, 1280, 320),
    (1024, 640, 5120),
    (1024, 2560, 640),
)
# DiT-XL/2 with its modulation, Stable Diffusion XL with its text, FLUX, Wan 1.3B
GPU_SHAPES = (
    (2, 1152, 6912),
    (512, 1152, 1152),
    (512, 1152, 4608),
    (2048, 1280, 10240),
    (2048, 5120, 1280),
    (154, 2048, 1280),
    (4608, 3072, 12288),
    (4608, 15360, 3072),
    (32760, 1536, 8960),
)
CODED_SHAPES = ((2, 1152, 6912), (64, 3072, 3072), (2048, 1280, 10240), (4608, 3072, 12288))


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Weights in the dtype of the data; float16 data meets float32 weights."""
    weights = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for M, K, N in shapes or SHAPES:
        x = torch.randn(M, K, device=device, dtype=dtype)
        weight = (torch.randn(N, K, device=device) / K**0.5).to(weights)
        bias, packed = torch.randn(N, device=device), pack(weight)
        ours = lambda a=(x, packed, N, bias, "none", None, None, dtype): linear(*a)
        plain = lambda x=x, w=weight.to(dtype), b=bias.to(dtype): F.linear(x, w, b)
        contenders = {"fastdiff": ours, "torch": plain}
        if device == "cpu" and dtype != torch.float16:  # which oneDNN multiplies on few CPUs
            contenders["onednn"] = onednn(x, weight.to(dtype), bias.to(dtype))
        if device == "cuda":
            contenders |= surrounded(x, packed, weight.to(dtype), bias)
        yield Case(label(M, K, N, dtype), contenders, traffic(x, packed, N), 2 * M * K * N)


def surrounded(x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, Callable]:
    """A product, GELU, a gate and a residual: ours, torch's one after another, and torch.compile's."""
    N, dtype = len(bias), x.dtype
    gate, residual = torch.randn(1, N, device=x.device), torch.randn(x.shape[0], N, device=x.device, dtype=dtype)
    plain = lambda x, w, b, g, r: r + g * F.gelu(F.linear(x, w, b), approximate="tanh")
    peers = (x, weight, bias.to(dtype), gate.to(dtype), residual)
    return {
        "fastdiff gelu, gate, residual": lambda: linear(x, packed, N, bias, "gelu_tanh", gate, residual, dtype),
        "torch gelu, gate, residual": lambda: plain(*peers),
        "torch.compile gelu, gate, residual": lambda f=torch.compile(plain): f(*peers),
    }


def label(M: int, K: int, N: int, dtype: torch.dtype) -> str:
    """The shape for people."""
    return f"{M} x {K} x {N}, {dtype}"


def traffic(x: torch.Tensor, packed: torch.Tensor, N: int) -> int:
    """Bytes of the data, the weight and the result."""
    return x.nbytes + packed.nbytes + x.shape[0] * N * x.element_size()


def onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The same through oneDNN, with its own layout of the weight."""
    library = torch.ops.mkldnn
    packed = library._reorder_linear_weight(weight, x.shape[0])
    return lambda: library._linear_pointwise(x, packed, bias, "none", [], "")
