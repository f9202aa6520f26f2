"""Layer or root-mean-square norm of token rows, then scale and shift: the front of every transformer block."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, result_dtype, widen
from fastdiff.ops.registry import op

KINDS = ("layer", "rms")
_NO_VECTOR, _NO_ROWS = (0, 0, 0), (0, 0, 0, 0)


def check_norm(name: str, x, kind, weight, bias, shift, scale) -> None:
    """Raises on arguments that no variant of the three ops made of this norm takes."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        raise ValueError(f"{name}: x must be [B, N, C] float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}")
    if kind not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    B, _, C = x.shape
    for label, value, shape in (
        ("weight", weight, (C,)),
        ("bias", bias, (C,)),
        ("shift", shift, (B, C)),
        ("scale", scale, (B, C)),
    ):
        if value is not None and (value.shape != shape or value.dtype not in FLOATS or value.device != x.device):
            raise ValueError(
                f"{name}: {label} must be a float {list(shape)} on {x.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )


def _check(x, kind, weight, bias, eps, shift, scale, out_dtype) -> None:
    check_norm("norm_modulate", x, kind, weight, bias, shift, scale)
    if out_dtype not in FLOATS:
        raise TypeError(f"norm_modulate: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


@op(check=_check)
def norm_modulate(
    x: torch.Tensor,
    kind: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Normalizes each row, then multiplies by weight and 1 + scale and adds bias and shift.

    x       [B, N, C] float32, bfloat16 or float16; channels contiguous, other strides free
    kind    "layer": (x - mean) / sqrt(variance + eps); "rms": x / sqrt(mean square + eps)
    weight  [C] any float, or None; bias the same
    shift   [B, C] any float, rows may be strided, or None; scale the same
    out     [B, N, C] out_dtype: (norm(x) * weight + bias) * (1 + scale) + shift

    float32 arithmetic, statistics in two passes: a mean of 1e3 beside a deviation of 1 costs no digits.
    """
    return normalize(x, kind, weight, bias, eps, shift, scale).to(result_dtype(x, out_dtype))


def normalize(x, kind, weight, bias, eps, shift, scale) -> torch.Tensor:
    """The norm and what follows it, in float32 (float64 for float64)."""
    x, weight, bias, shift, scale = widen(x, weight, bias, shift, scale)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + scale[:, None])
    y = y if shift is None else y + shift[:, None]
    return y.contiguous()


def refuse_norm(x, weight, bias, shift, scale) -> str | None:
    """Why the C++ kernel cannot run, or None."""
    for value in (x, weight, bias, shift, scale):
        if value is not None and value.stride(-1) != 1 and value.shape[-1] != 1:
            return "channels must lie one after another"
    return None


def _vector(value: torch.Tensor | None) -> tuple[int, int, int]:
    if value is None:
        return _NO_VECTOR
    return value.data_ptr(), native.TYPE_CODES[value.dtype], value.stride(0) if value.dim() == 2 else 0


def _rows(value: torch.Tensor | None) -> tuple[int, int, int, int]:
    if value is None:
        return _NO_ROWS
    return value.data_ptr(), native.TYPE_CODES[value.dtype], value.stride(0), value.stride(1)


def run_norm(out, scales, total, x, y, gate, kind, weight, bias, eps, shift, scale) -> None:
    """Runs the kernel behind norm_modulate, norm_modulate_int8 (with scales) and gated_norm_modulate (with y, total)."""
    if x.numel() == 0:
        return
    native.cpu().norm_modulate(
        out.data_ptr(),
        native.TYPE_CODES[out.dtype],
        0 if scales is None else scales.data_ptr(),
        0 if total is None else total.data_ptr(),
        _rows(x),
        _rows(y),
        _vector(gate),
        _vector(weight),
        _vector(bias),
        _vector(scale),
        _vector(shift),
        *x.shape,
        eps,
        kind == "layer",
    )


@norm_modulate.variant(
    "cpu",
    devices=("cpu",),
    missing=native.cpu_missing,
    refuse=lambda x, kind, weight, bias, eps, shift, scale, out_dtype: refuse_norm(x, weight, bias, shift, scale),
)
def _(x, kind, weight, bias, eps, shift, scale, out_dtype):
    out = memory.empty(x.shape, out_dtype)
    run_norm(out, None, None, x, None, None, kind, weight, bias, eps, shift, scale)
    return out


def refuse_norm_triton(x, weight, bias, shift, scale) -> str | None:
    """Why the Triton kernel cannot run, or None."""
    from fastdiff.kernels.row_blocks import MAX_COLUMNS

    if x.shape[2] > MAX_COLUMNS:
        return f"rows of at most {MAX_COLUMNS} channels stay in registers, got {x.shape[2]}"
    return refuse_norm(x, weight, bias, shift, scale)


@norm_modulate.variant(
    "triton",
    devices=("cuda",),
    missing=native.triton_missing,
    refuse=lambda x, kind, weight, bias, eps, shift, scale, out_dtype: refuse_norm_triton(
        x, weight, bias, shift, scale
    ),
)
def _(x, kind, weight, bias, eps, shift, scale, out_dtype):
    from fastdiff.kernels.norm_modulate import norm_modulate_triton

    out = memory.empty(x.shape, out_dtype, x.device)
    norm_modulate_triton(out, None, None, x, None, None, kind, weight, bias, eps, shift, scale)
    return out


def norm_samples(device):
    """Calls (x, kind, weight, bias, eps, shift, scale) for this op and those made of it."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    make = lambda x, kind, *rest: tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in (x, kind, *rest))
    for B, N, C in (
        (1, 1, 1),
        (2, 3, 16),
        (1, 5, 17),
        (3, 7, 31),
        (2, 4, 64),
        (1, 2, 67),
        (2, 3, 130),
        (0, 3, 8),
        (2, 0, 8),
    ):
        x, six = normal(B, N, C), normal(B, 6 * C)
        yield make(x, "layer", None, None, 1e-6, six[:, :C], six[:, C : 2 * C])
        yield make(x, "rms", normal(C), None, 1e-6, None, None)
    for dtype in FLOATS:
        qkv = (2 * normal(2, 5, 3 * 48) + 1).to(dtype)
        row = lambda dtype=dtype: normal(2, 48).to(dtype)
        yield make(qkv[..., 48:96], "layer", normal(48).to(dtype), normal(48), 1e-5, row(), row())
        yield make(qkv[:, ::2, :48], "rms", normal(48).to(dtype), None, 1e-5, None, row())
        yield make(qkv.transpose(0, 1)[..., 96:], "layer", None, None, 1e-5, None, None)
    yield make(1e3 + normal(1, 3, 320), "layer", normal(320), normal(320), 1e-6, None, None)
    yield make(normal(1, 2, 9001), "layer", None, None, 1e-6, normal(1, 9001), None)
    bad = normal(1, 3, 40)
    bad[0, 1, 7], bad[0, 2, 39] = torch.nan, torch.inf
    yield make(bad, "layer", None, normal(40), 1e-6, None, None)
    yield make(torch.full((1, 2, 20), 3.0), "layer", None, None, 1e-6, None, None)  # no variance
    yield make(1e18 * normal(1, 2, 20), "rms", normal(20), None, 1e-6, None, None)


@norm_modulate.sample
def _(device):
    for k, args in enumerate(norm_samples(device)):
        yield (*args, (torch.float32, torch.bfloat16, torch.float16)[k % 3 if k < 22 else 0])
