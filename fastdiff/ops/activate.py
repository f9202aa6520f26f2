"""Activations that no matrix product before them could take along."""

import math

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, widen
from fastdiff.ops.registry import op
from fastdiff.ops.rows import row_stride


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


# the place of a name is its number in csrc/cpu/activate.h
ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def _check(x: torch.Tensor, kind: str) -> None:
    if kind not in ACTIVATIONS:
        raise ValueError(f"activate: kind must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    if x.dtype not in FLOATS or x.dim() == 0:
        raise TypeError(f"activate: x must be [..., C] float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}")


@op(check=_check)
def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Applies an activation to every element.

    x     [..., C] float32, bfloat16 or float16; C contiguous, rows evenly spaced
    kind  "gelu" (with erf), "gelu_tanh" or "silu"
    out   x.shape, x.dtype

    float32 arithmetic; minus infinity gives NaN, as in torch.
    """
    return ACTIVATIONS[kind](*widen(x)).to(x.dtype).contiguous()


def refuse_rows(x: torch.Tensor, kind: str) -> str | None:
    """Why the C++ kernel cannot run, or None."""
    return None if row_stride(x) is not None else "rows must be evenly spaced and their elements contiguous"


def run_activate(out: torch.Tensor, x: torch.Tensor, kind: str, gated: bool) -> None:
    """Runs the kernel behind activate and geglu; contiguous tensors are one row."""
    if out.numel() == 0:
        return
    n = out.shape[-1]
    rows, stride = (1, 0) if not gated and x.is_contiguous() else (out.numel() // n, row_stride(x))
    n = out.numel() // rows
    native.cpu().activate(
        out.data_ptr(), x.data_ptr(), native.TYPE_CODES[x.dtype], CODES[kind], gated, rows, n, stride
    )


@activate.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=refuse_rows)
def _(x, kind):
    out = memory.empty(x.shape, x.dtype)
    run_activate(out, x, kind, False)
    return out


@activate.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=refuse_rows)
def _(x, kind):
    from fastdiff.kernels.activate import activate_triton

    out = memory.empty(x.shape, x.dtype, x.device)
    activate_triton(out, x, kind, False, row_stride(x))
    return out


@activate.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: 3 * torch.randn(shape, generator=generator).to(device)
    special = [0.0, -0.0, 1e-40, 88.8, -88.8, 1e30, -1e30, 5.6, -5.6, torch.inf, -torch.inf, torch.nan]
    for kind in ACTIVATIONS:
        for shape in ((1,), (7,), (2, 3, 16), (3, 33), (0, 4), (4, 0)):
            yield normal(*shape), kind
        for dtype in FLOATS:
            yield normal(2, 3, 70).to(dtype)[..., 3:50], kind
            yield normal(2, 3, 5).to(dtype).transpose(1, 2), kind  # the reference serves it
        yield torch.tensor(special, device=device), kind
