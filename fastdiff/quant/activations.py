"""Activations as codes: the bit-exact float32 rule of the kernels, and its asymmetric form for the papers' recipes."""

import torch

from fastdiff.quant import formats
from fastdiff.quant.ranges import TINY, limits
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

_INVERSE_127 = torch.tensor(1.0 / 127.0, dtype=torch.float32)


def dynamic_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes with one scale per row.

    x        [..., K] any float
    returns  [..., K] int8 and [...] float32; a row with NaN or Inf gets the scale NaN and codes 0
    """
    x = x.float()
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    inverse = torch.where(amax > 0, torch.full_like(amax, 127) / amax, torch.zeros_like(amax)).clamp(max=3e38)
    codes = (x * inverse[..., None]).round().clamp(-127, 127).nan_to_num(0.0)
    bad = ~torch.isfinite(amax)
    scale = torch.where(bad, torch.full_like(amax, float("nan")), amax * _INVERSE_127)
    return codes.to(torch.int8), scale


def fake_quantize(x: Tensor, spec: TensorSpec, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """The values that remain of x after quantization, float32: what kernels without this format compute with.

    x            [..., K]; rows are the last dimension
    scale, zero  static ranges that broadcast against x; None measures them row by row
    """
    x = x.float()
    if scale is None:
        return _dynamic(x, spec)
    if spec.dtype == "fp8_e4m3":
        return formats.to_e4m3(x / scale).float() * scale
    shift = 0.0 if zero is None else zero.float()
    codes = ((x * (1.0 / scale)).round() + shift).clamp(*limits(spec))
    return (codes - shift) * scale


def _dynamic(x: Tensor, spec: TensorSpec) -> Tensor:
    if spec.dtype == "int8" and spec.granularity == "token":
        codes, scale = dynamic_codes(x)
        return codes.float() * scale[..., None]
    group = x.shape[-1] if spec.granularity == "token" else spec.group_size
    if spec.granularity not in ("token", "group") or x.shape[-1] % group:
        raise ValueError(f"quantize: dynamic activations are scaled per token or per group, got {spec}")
    rows = x.unflatten(-1, (-1, group))
    if spec.dtype == "fp8_e4m3":
        scale = (rows.abs().amax(-1, keepdim=True) / formats.E4M3_MAX).clamp(min=TINY)
        return (formats.to_e4m3(rows / scale).float() * scale).flatten(-2)
    if spec.dtype == "nvfp4":
        scale = formats.to_e4m3(rows.abs().amax(-1, keepdim=True) / formats.E2M1_MAX).float().clamp(min=TINY)
        return (formats.from_e2m1(formats.to_e2m1(rows / scale)) * scale).flatten(-2)
    top = (1 << (spec.bits - 1)) - 1
    if spec.dtype.startswith("uint"):
        top, low = (1 << spec.bits) - 1, rows.amin(-1, keepdim=True).clamp(max=0.0)
        scale = ((rows.amax(-1, keepdim=True).clamp(min=0.0) - low) / top).clamp(min=TINY)
        shift = (-low / scale).round()
        return (((rows / scale).round() + shift).clamp(0, top) - shift).mul(scale).flatten(-2)
    scale = (rows.abs().amax(-1, keepdim=True) / top).clamp(min=TINY)
    return ((rows / scale).round().clamp(-top, top) * scale).flatten(-2)
