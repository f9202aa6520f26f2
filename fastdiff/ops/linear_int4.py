"""What the two linear layers on 4-bit weights share."""

import torch
import torch.nn.functional as F

from fastdiff.ops.linear_call import FLOATS, check_scales, refuse_triton
from fastdiff.ops.packing import holds_int4, pack_int4, padded_columns, unpack_int4


def check_int4(op, x, weight, weight_scale, group, out_features, activation) -> None:
    """Raises where weight, scales and group do not fit together."""
    K = x.shape[-1]
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be a float, got {x.dtype}")
    if K % 8 or not holds_int4(weight, K):
        raise ValueError(f"{op}: weight must be packed int4 of [N, {K}], got {weight.dtype} {list(weight.shape)}")
    if group < 8 or group % 8 or K % group:
        raise ValueError(f"{op}: group must be a multiple of 8 that divides K = {K}, got {group}")
    check_scales(op, weight_scale, padded_columns(weight), out_features, activation, K // group)


def refuse_triton_int4(x, weight, weight_scale, out_features, group, *rest) -> str | None:
    """Why the Triton kernel cannot serve a call, or None."""
    if group % 32:
        return f"tensor cores add up 32 k at least, and a scale is shared by {group}"
    return refuse_triton(x, weight, rest[-1], weight_scale)


def group_sums(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, group: int) -> torch.Tensor:
    """sum over groups of weight_scale * (x @ codes.T), in the wider of x's and the scales' type. [..., N padded to 16]"""
    wide = torch.promote_types(torch.promote_types(torch.float32, x.dtype), weight_scale.dtype)
    N, K = padded_columns(weight), x.shape[-1]
    scales = F.pad(weight_scale, (0, 0, 0, N - weight_scale.shape[0])).to(wide)
    codes = unpack_int4(weight, N, K).to(wide)
    y = torch.zeros(*x.shape[:-1], N, dtype=wide, device=x.device)
    for g, start in enumerate(range(0, K, group)):
        part = x[..., start : start + group].to(wide) @ codes[:, start : start + group].T
        y = y + part * scales[:, g]
    return y


def quantized_int4(weight: torch.Tensor, group: int, layout: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed 4-bit codes and scales of a float weight [N, K], with one scale per row and group."""
    groups = weight.view(weight.shape[0], weight.shape[1] // group, group)
    scale = (groups.abs().amax(2) / 7).clamp(min=1e-30)
    return pack_int4(torch.round(groups / scale[..., None]).to(torch.int8).view(weight.shape), layout), scale
