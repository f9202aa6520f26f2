"""Norm and rotary embedding of queries or keys, head by head."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, result_dtype, widen
from fastdiff.ops.registry import op

MAX_HEAD_DIM = 1024
_NOTHING = (0, 0, 0, 0, 0)


def _check(x, weight, eps, cos, sin, interleaved, out_dtype) -> None:
    if x.dim() != 4 or x.dtype not in FLOATS:
        raise ValueError(
            f"qk_norm_rope: x must be [B, N, H, D] float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}"
        )
    B, N, _, D = x.shape
    if D > MAX_HEAD_DIM or (cos is not None and D % 2):
        raise ValueError(f"qk_norm_rope: D must be even and at most {MAX_HEAD_DIM}, got {D}")
    if weight is not None and (weight.shape != (D,) or weight.dtype not in FLOATS):
        raise ValueError(f"qk_norm_rope: weight must be a float [{D}], got {weight.dtype} {list(weight.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError("qk_norm_rope: cos and sin must both be given, or neither")
    for name, value in (("cos", cos), ("sin", sin)):
        if value is not None and (value.shape not in ((N, D), (B, N, D)) or value.dtype not in FLOATS):
            raise ValueError(
                f"qk_norm_rope: {name} must be a float {[N, D]} or {[B, N, D]}, got {value.dtype} {list(value.shape)}"
            )
    if out_dtype not in FLOATS:
        raise TypeError(f"qk_norm_rope: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


@op(check=_check)
def qk_norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Divides each head by its root mean square, multiplies by weight, and rotates pairs of elements.

    x            [B, N, H, D] float32, bfloat16 or float16; D contiguous and at most 1024, other strides free
    weight       [D] any float, or None
    eps          added to the mean square; None leaves the norm out
    cos          [N, D] or [B, N, D] any float, D contiguous, or None for no rotation; sin the same
    interleaved  pairs are elements (2 i, 2 i + 1), else (i, i + D / 2)
    out          [B, N, H, D] out_dtype, contiguous: y * cos + turned(y) * sin, where a pair (a, b) turns into (-b, a)

    float32 arithmetic.
    """
    y, weight, cos, sin = widen(x, weight, cos, sin)
    if eps is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    if cos is not None:
        y = y * cos.unsqueeze(-2) + _turned(y, interleaved) * sin.unsqueeze(-2)
    out = torch.empty(x.shape, dtype=result_dtype(x, out_dtype), device=x.device)
    return out.copy_(y)


def _turned(y: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack([-y[..., 1::2], y[..., 0::2]], dim=-1).flatten(-2)
    a, b = y.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def refuse_heads(*values: torch.Tensor | None) -> str | None:
    """Why the C++ kernel cannot run, or None."""
    for value in values:
        if value is not None and value.stride(-1) != 1 and value.shape[-1] > 1:
            return "the elements of a head must lie one after another"
    return None


def _rows(value: torch.Tensor | None) -> tuple[int, int, int, int, int]:
    """Address, type and strides of sample, token and head; dimensions that are not there have stride 0."""
    if value is None:
        return _NOTHING
    sample, token, head = {1: (0, 0, 0), 2: (0, value.stride(0), 0)}.get(value.dim()) or (*value.stride()[:-1], 0)[:3]
    return value.data_ptr(), native.TYPE_CODES[value.dtype], sample, token, head


def run_heads(out, x, weight, eps, cos, sin, interleaved) -> None:
    """Runs the kernel on a contiguous result with as many elements as x."""
    if out.numel():
        native.cpu().qk_norm_rope(
            out.data_ptr(),
            native.TYPE_CODES[out.dtype],
            _rows(x),
            _rows(weight),
            _rows(cos),
            _rows(sin),
            *x.shape,
            -1.0 if eps is None else eps,
            interleaved,
        )


def _refuse(x, weight, eps, cos, sin, interleaved, out_dtype) -> str | None:
    return refuse_heads(x, weight, cos, sin)


@qk_norm_rope.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, weight, eps, cos, sin, interleaved, out_dtype):
    out = memory.empty(x.shape, out_dtype)
    run_heads(out, x, weight, eps, cos, sin, interleaved)
    return out


@qk_norm_rope.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x, weight, eps, cos, sin, interleaved, out_dtype):
    from fastdiff.kernels.qk_norm_rope import qk_norm_rope_triton

    out = memory.empty(x.shape, out_dtype, x.device)
    qk_norm_rope_triton(out, x, weight, eps, cos, sin, interleaved)
    return out


@qk_norm_rope.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    for k, (B, N, H, D) in enumerate(
        (
            (1, 1, 1, 2),
            (2, 3, 2, 16),
            (1, 5, 3, 34),
            (2, 2, 2, 72),
            (1, 3, 1, 128),
            (2, 4, 2, 40),
            (0, 2, 1, 4),
            (1, 0, 1, 4),
        )
    ):
        angle = normal(*((B, N, D) if k % 2 else (N, D)))
        for interleaved in (False, True):
            yield normal(B, N, H, D), normal(D), 1e-6, angle.cos(), angle.sin(), interleaved, torch.float32
    angle = normal(5, 24)
    for dtype in FLOATS:
        qkv = normal(2, 5, 3, 4, 24).to(dtype)
        yield qkv[:, :, 1], normal(24).to(dtype), 1e-5, angle.cos(), angle.sin().to(dtype), dtype == FLOATS[0], dtype
        yield (
            qkv[:, :, 2].transpose(1, 2).contiguous().transpose(1, 2),
            None,
            None,
            angle.cos(),
            angle.sin(),
            True,
            dtype,
        )
    yield normal(2, 3, 2, 17), normal(17), 1e-6, None, None, False, torch.bfloat16
    bad = normal(1, 2, 2, 8)
    bad[0, 0, 0, 3], bad[0, 1, 1, 7] = torch.nan, torch.inf
    yield bad, normal(8), 1e-6, None, None, False, torch.float32
