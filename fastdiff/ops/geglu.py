"""Gated linear units: the half of a projection times the activated other half."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.activate import ACTIVATIONS, refuse_rows, run_activate
from fastdiff.ops.promote import FLOATS, widen
from fastdiff.ops.registry import op
from fastdiff.ops.rows import row_stride

KINDS = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}


def _check(x: torch.Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"geglu: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] % 2:
        raise TypeError(f"geglu: x must be [..., 2 C] float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}")


@op(check=_check)
def geglu(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Multiplies the first half of each row by the activated second half.

    x     [..., 2 C] float32, bfloat16 or float16: C values, then C gates; rows evenly spaced, their elements contiguous
    kind  "geglu" (erf), "geglu_tanh" or "swiglu"
    out   [..., C] x.dtype: value * activation(gate)

    float32 arithmetic.
    """
    value, gate = widen(x)[0].chunk(2, dim=-1)
    return (value * ACTIVATIONS[KINDS[kind]](gate)).to(x.dtype).contiguous()


@geglu.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=refuse_rows)
def _(x, kind):
    out = memory.empty((*x.shape[:-1], x.shape[-1] // 2), x.dtype)
    run_activate(out, x, KINDS[kind], True)
    return out


@geglu.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=refuse_rows)
def _(x, kind):
    from fastdiff.kernels.activate import activate_triton

    out = memory.empty((*x.shape[:-1], x.shape[-1] // 2), x.dtype, x.device)
    activate_triton(out, x, KINDS[kind], True, row_stride(x))
    return out


@geglu.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: 2 * torch.randn(shape, generator=generator).to(device)
    for kind in KINDS:
        for shape in ((2,), (3, 14), (2, 3, 32), (5, 66), (0, 4), (3, 0)):
            yield normal(*shape), kind
        for dtype in FLOATS:
            yield normal(2, 3, 200).to(dtype)[..., 7:101], kind
    special = torch.tensor([[2.0, 0.0, 1.0, 1.0, torch.nan, 1e30, -torch.inf, 0.0, torch.nan, 1.0]], device=device)
    yield special, "geglu"
