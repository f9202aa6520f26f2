"""Group norm of images whose channels come last, with what follows it in a ResNet block."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, result_dtype, widen
from fastdiff.ops.registry import op

ACTIVATIONS = ("none", "silu")
_NOTHING = (0, 0, 0)


def check_group_norm(name, x, channels, groups, weight, bias, activation, scale, shift, out_scale, out_dtype) -> None:
    """Raises on arguments that no variant of the two group norms takes."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: x must be float32, bfloat16 or float16, got {x.dtype}")
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: groups must divide the {channels} channels, got {groups}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    one, all_ = (channels,), (x.shape[0], channels)
    for label, value, shape in (
        ("weight", weight, one),
        ("bias", bias, one),
        ("scale", scale, all_),
        ("shift", shift, all_),
    ):
        if value is not None and (value.shape != shape or value.dtype not in FLOATS or value.device != x.device):
            raise ValueError(
                f"{name}: {label} must be a float {list(shape)} on {x.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
    if out_dtype is torch.int8:
        if out_scale is None or out_scale.dtype != torch.float32 or out_scale.numel() != 1:
            raise ValueError(f"{name}: out_scale must be one float32 for int8 results, got {out_scale}")
    elif out_dtype not in FLOATS:
        raise TypeError(f"{name}: out_dtype must be float32, bfloat16, float16 or int8, got {out_dtype}")


def _check(x, x2, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype) -> None:
    if x.dim() != 4 or (x2 is not None and (x2.dim() != 4 or x2.shape[:3] != x.shape[:3])):
        raise ValueError(f"group_norm: x and x2 must be [B, H, W, C], got {list(x.shape)} and {x2 and list(x2.shape)}")
    if x2 is not None and (x2.dtype not in FLOATS or x2.device != x.device):
        raise ValueError(f"group_norm: x2 must be a float on {x.device}, got {x2.dtype} on {x2.device}")
    channels = x.shape[3] + (0 if x2 is None else x2.shape[3])
    check_group_norm("group_norm", x, channels, groups, weight, bias, activation, scale, shift, out_scale, out_dtype)


@op(check=_check)
def group_norm(
    x: torch.Tensor,
    x2: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Normalizes groups of channels of NHWC images, scales, shifts, activates and quantizes.

    x           [B, H, W, C1] float32, bfloat16 or float16, contiguous
    x2          [B, H, W, C2] the same, or None: its channels follow those of x; groups may hold channels of both
    groups      divides C = C1 + C2
    weight      [C] any float, or None; bias the same
    activation  "none" or "silu", after everything else
    scale       [B, C] any float, rows may be strided, or None; shift the same
    out_scale   [1] float32: what an int8 code of 1 means
    out         [B, H, W, C] out_dtype: act((norm(x) * weight + bias) * (1 + scale) + shift)

    float32 arithmetic; sums about one of the values summed, so that a mean of 1e3 beside a deviation of 1 costs no
    digits. int8: out_scale's reciprocal times the float32 result, rounded to nearest even in [-127, 127], NaN to 0.
    """
    x = x if x2 is None else torch.cat([x, x2.to(x.dtype)], dim=3)
    B, H, W, C = x.shape
    y = normalize(x.reshape(B, H * W, groups, C // groups).transpose(1, 2), eps).transpose(1, 2).reshape(x.shape)
    per_channel = lambda v: v[:, None, None] if v.dim() == 2 else v
    return finish(x, y, per_channel, weight, bias, activation, scale, shift, out_scale, out_dtype)


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) over the last two dimensions, in float32 (float64 for float64)."""
    (x,) = widen(x)
    x = x - x.mean((-2, -1), keepdim=True)
    return x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + eps)


def finish(x, y, per_channel, weight, bias, activation, scale, shift, out_scale, out_dtype) -> torch.Tensor:
    """What follows the norm; `per_channel` shapes [C] and [B, C] so that they multiply y."""
    weight, bias, scale, shift = widen(weight, bias, scale, shift)
    y = y if weight is None else y * per_channel(weight)
    y = y if bias is None else y + per_channel(bias)
    y = y if scale is None else y * (1 + per_channel(scale))
    y = y if shift is None else y + per_channel(shift)
    y = y / (1 + torch.exp(-y)) if activation == "silu" else y
    if out_dtype is torch.int8:
        codes = torch.round(y.float() * (1 / out_scale.float())).clamp(-127, 127)
        return codes.nan_to_num(0.0).to(torch.int8).contiguous()
    return y.to(result_dtype(x, out_dtype)).contiguous()


def _vector(value: torch.Tensor | None) -> tuple[int, int, int]:
    if value is None:
        return _NOTHING
    return value.data_ptr(), native.TYPE_CODES[value.dtype], value.stride(0) if value.dim() == 2 else 0


def run_group_norm(
    kernel, out, x, x2, channels, pixels, groups, weight, bias, eps, activation, scale, shift, out_scale
):
    """Runs one of the two kernels. `channels` of x and of x2."""
    codes = native.TYPE_CODES
    kernel(
        out.data_ptr(),
        codes[out.dtype],
        (x.data_ptr(), codes[x.dtype], channels[0]),
        (x2.data_ptr(), codes[x2.dtype], channels[1]) if x2 is not None else _NOTHING,
        _vector(weight),
        _vector(bias),
        _vector(scale),
        _vector(shift),
        0 if out_scale is None else out_scale.data_ptr(),
        x.shape[0],
        pixels,
        groups,
        eps,
        activation == "silu",
    )


def refuse_group_norm(images, vectors) -> str | None:
    """Why the C++ kernels cannot run, or None."""
    if not all(v is None or v.is_contiguous() for v in images):
        return "x and x2 must be contiguous"
    for v in vectors:
        if v is not None and v.stride(-1) != 1 and v.shape[-1] != 1:
            return "channels of weight, bias, scale and shift must lie one after another"
    return None


def _refuse(x, x2, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype) -> str | None:
    return refuse_group_norm((x, x2), (weight, bias, scale, shift))


@group_norm.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, x2, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype):
    B, H, W, C1 = x.shape
    C2 = 0 if x2 is None else x2.shape[3]
    out = memory.empty((B, H, W, C1 + C2), out_dtype)
    if out.numel():
        rest = (weight, bias, eps, activation, scale, shift, out_scale)
        run_group_norm(native.cpu().group_norm, out, x, x2, (C1, C2), H * W, groups, *rest)
    return out


@group_norm.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(x, x2, groups, weight, bias, eps, activation, scale, shift, out_scale, out_dtype):
    from fastdiff.kernels.group_norm import group_norm_triton

    B, H, W, C1 = x.shape
    out = memory.empty((B, H, W, C1 + (0 if x2 is None else x2.shape[3])), out_dtype, x.device)
    group_norm_triton(out, x, x2, True, groups, weight, bias, eps, activation, scale, shift, out_scale)
    return out


def images(device):
    """Calls (x, C2, groups, weight, bias, eps, activation, scale, shift) with x [B, H, W, C1 + C2] for both layouts."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    make = lambda *args: tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in args)
    for B, H, W, C1, C2, groups in (
        (1, 1, 1, 1, 0, 1), (2, 3, 5, 6, 0, 3), (1, 2, 2, 16, 0, 4), (2, 5, 3, 17, 0, 17), (3, 4, 4, 20, 10, 3),
        (1, 3, 7, 5, 27, 4), (2, 2, 3, 300, 20, 32), (0, 2, 2, 8, 0, 2), (2, 0, 2, 8, 0, 2),
    ):  # fmt: skip
        C = C1 + C2
        six = normal(B, 3 * C)
        yield make(normal(B, H, W, C), C2, groups, normal(C), normal(C), 1e-5, "silu", None, None)
        yield make(normal(B, H, W, C), C2, groups, None, None, 1e-5, "none", six[:, :C], six[:, C : 2 * C])
    for dtype in FLOATS:
        x = (2 * normal(2, 5, 5, 48) + 1).to(dtype)
        yield make(x, 16, 4, normal(48).to(dtype), normal(48), 1e-6, "silu", normal(2, 48).to(dtype), normal(2, 48))
    yield make(1e3 + normal(1, 24, 24, 32), 0, 8, normal(32), None, 1e-6, "none", None, None)
    yield make(normal(1, 40, 44, 40), 8, 4, None, normal(40), 1e-6, "silu", None, None)  # several chunks
    outlier = normal(1, 40, 40, 40)
    outlier[0, 0, 0, 0], outlier[0, 20, 3, 17] = 1e4, -1e4
    yield make(outlier, 0, 10, None, None, 1e-6, "none", None, None)
    bad = normal(2, 4, 4, 12)
    bad[0, 1, 1, 0], bad[1, 3, 3, 11] = torch.nan, torch.inf
    yield make(bad, 0, 3, normal(12), None, 1e-6, "silu", None, None)
    yield make(torch.full((1, 3, 3, 8), 5.0), 0, 2, None, None, 1e-6, "silu", None, None)


@group_norm.sample
def _(device):
    for k, (x, C2, groups, *rest) in enumerate(images(device)):
        C1 = x.shape[3] - C2
        parts = (x, None) if C2 == 0 else (x[..., :C1].contiguous(), x[..., C1:].contiguous())
        yield (*parts, groups, *rest, None, (torch.float32, torch.bfloat16, torch.float16)[k % 3 if k < 21 else 0])
        # a code at a tie may differ from float64's: small images only
        if x.numel() < 1000:
            yield (*parts, groups, *rest, torch.tensor([0.02], device=device), torch.int8)
