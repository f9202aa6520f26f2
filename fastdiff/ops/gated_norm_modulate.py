"""The end of one residual branch and the norm in front of the next, in one pass."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.norm_modulate import (
    check_norm,
    norm_samples,
    normalize,
    refuse_norm,
    refuse_norm_triton,
    run_norm,
)
from fastdiff.ops.promote import FLOATS, result_dtype, widen
from fastdiff.ops.registry import op


def _check(x, y, gate, kind, weight, bias, eps, shift, scale, out_dtype) -> None:
    check_norm("gated_norm_modulate", x, kind, weight, bias, shift, scale)
    for name, value, shape in (("y", y, x.shape), ("gate", gate, (x.shape[0], x.shape[2]))):
        if value is not None and (value.shape != shape or value.dtype not in FLOATS or value.device != x.device):
            raise ValueError(
                f"gated_norm_modulate: {name} must be a float {list(shape)} on {x.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
    if out_dtype not in FLOATS:
        raise TypeError(f"gated_norm_modulate: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


@op(check=_check)
def gated_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    kind: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds gate * y to x, and normalizes and modulates the sum.

    x, y    [B, N, C] float32, bfloat16 or float16; channels contiguous, other strides free
    gate    [B, C] any float, rows may be strided, or None for 1
    total   [B, N, C] x's dtype: x + gate * y
    normed  [B, N, C] out_dtype: norm_modulate(total, ...); the arguments that follow gate are those of that op

    float32 arithmetic; the norm sees `total` as it was rounded.
    """
    wide, more, factor = widen(x, y, gate)
    total = (wide + (more if gate is None else factor[:, None] * more)).to(x.dtype).contiguous()
    return total, normalize(total, kind, weight, bias, eps, shift, scale).to(result_dtype(x, out_dtype))


def _refuse(x, y, gate, kind, weight, bias, eps, shift, scale, out_dtype) -> str | None:
    return refuse_norm(x, weight, bias, shift, scale) or refuse_norm(y, gate, None, None, None)


@gated_norm_modulate.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, y, gate, kind, weight, bias, eps, shift, scale, out_dtype):
    total, out = memory.empty(x.shape, x.dtype), memory.empty(x.shape, out_dtype)
    run_norm(out, None, total, x, y, gate, kind, weight, bias, eps, shift, scale)
    return total, out


def _refuse_triton(x, y, gate, kind, weight, bias, eps, shift, scale, out_dtype) -> str | None:
    return refuse_norm_triton(x, weight, bias, shift, scale) or refuse_norm(y, gate, None, None, None)


@gated_norm_modulate.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(x, y, gate, kind, weight, bias, eps, shift, scale, out_dtype):
    from fastdiff.kernels.norm_modulate import norm_modulate_triton

    total, out = memory.empty(x.shape, x.dtype, x.device), memory.empty(x.shape, out_dtype, x.device)
    norm_modulate_triton(out, None, total, x, y, gate, kind, weight, bias, eps, shift, scale)
    return total, out


@gated_norm_modulate.sample
def _(device):
    generator = torch.Generator().manual_seed(1)
    for k, (x, *rest) in enumerate(norm_samples(device)):
        B, N, C = x.shape
        y = torch.randn(B, N, 2 * C, generator=generator).to(device, x.dtype)[..., C:]
        gate = torch.randn(B, 3 * C, generator=generator).to(device)[:, C : 2 * C] if k % 3 else None
        yield (x, y, gate, *rest, x.dtype if k % 2 else torch.float32)
