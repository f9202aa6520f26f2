"""A linear layer on int8 weights and int8 activations, quantized on the way in and, if wanted, on the way out."""

import torch
import torch.nn.functional as F

from fastdiff.ops import native
from fastdiff.ops.linear_call import (
    FLOATS,
    check_call,
    check_scales,
    columns,
    finish,
    quantize_rows,
    refuse_triton,
    run,
    run_triton,
    triton_codes,
)
from fastdiff.ops.linear_samples import layouts, samples
from fastdiff.ops.packing import holds, pack, padded_columns, refuse_rows, unpack, weight_sums
from fastdiff.ops.registry import op


def _check(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if weight.dtype != torch.int8 or not holds(weight, x.shape[-1]):
        raise ValueError(f"linear_w8a8: weight must be packed int8 of [N, {x.shape[-1]}], got {list(weight.shape)}")
    if x.dtype not in FLOATS and (x.dtype != torch.int8 or x_scale is None):
        raise TypeError(f"linear_w8a8: x must be a float, or int8 with an x_scale, got {x.dtype}")
    if x_scale is not None:
        rows = x.shape[:-1].numel()
        if x_scale.numel() != 1 and (x.dtype != torch.int8 or x_scale.numel() != rows or not x_scale.is_contiguous()):
            raise ValueError(f"linear_w8a8: x_scale must be [1], or [{rows}] for int8 x, got {list(x_scale.shape)}")
    check_scales("linear_w8a8", weight_scale, padded_columns(weight), out_features, activation)
    if weight_sum.dtype != torch.int32 or weight_sum.shape != weight_scale.shape or not weight_sum.is_contiguous():
        raise ValueError(
            f"linear_w8a8: weight_sum must be contiguous int32 {list(weight_scale.shape)}, "
            f"got {weight_sum.dtype} {list(weight_sum.shape)}"
        )
    padded = padded_columns(weight)
    check_call("linear_w8a8", x, out_features, padded, activation, bias, gate, residual, out_scale, out_dtype)


@op(check=_check)
def linear_w8a8(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Computes residual + gate * activation(x_scale * weight_scale * (codes of x @ codes of W.T) + bias) in one pass.

    x             [..., K] float32, float16, bfloat16, or int8 codes in [-127, 127]; rows with one stride
    x_scale       of int8 x: [1], or one per row. Of float x: [1] quantizes with it, None with max |row| / 127 per row
    weight        codes of W [N, K] in [-127, 127], packed by `packing.pack`; for pairs by `packing.pack_pairs`
    weight_scale  [N] float32; for pairs interleaved like the weight, as are weight_sum and bias
    weight_sum    [N] int32, sums of the codes over K (`packing.weight_sums`)
    out_scale     [1] float32 where out_dtype is int8: codes are round(y / out_scale) in [-127, 127]
    out           [..., N] out_dtype (N / 2 for pairs)

    out_features, bias, activation, gate and residual as in `linear`. Sums are exact int32, everything else is float32;
    the bits are equal on all instruction sets without an activation. A row with NaN or infinity becomes NaN.
    """
    K, wide = x.shape[-1], weight_scale.dtype
    codes, scale = (x, x_scale) if x.dtype == torch.int8 else quantize_rows(x, x_scale)
    sums = codes.double() @ unpack(weight, padded_columns(weight), K).double().T  # exact below 2^53
    scale = scale.to(wide).view(*x.shape[:-1], 1) if scale.numel() != 1 else scale.to(wide).view(1)
    scales = F.pad(weight_scale, (0, padded_columns(weight) - weight_scale.numel()))
    y = sums.to(wide) * scale * scales
    return finish(y, columns(out_features, activation), bias, activation, gate, residual, out_scale, out_dtype)


def _refuse(x, x_scale, weight, weight_scale, *rest):
    if x.dtype == torch.float64 or weight_scale.dtype != torch.float32 or rest[-1] == torch.float64:
        return "computes in float32"
    return refuse_rows(weight)


@linear_w8a8.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(
    x, x_scale, weight, weight_scale, weight_sum, out_features, bias, activation, gate, residual, out_scale, out_dtype
):
    return run(
        native.cpu().linear_w8a8, x, x_scale, weight, weight_scale, weight_sum, 0, out_features, bias, activation, gate,
        residual, out_scale, out_dtype,
    )  # fmt: skip


def _refuse_triton(x, x_scale, weight, weight_scale, *rest):
    return refuse_triton(x, weight, rest[-1], weight_scale)


@linear_w8a8.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(
    x, x_scale, weight, weight_scale, weight_sum, out_features, bias, activation, gate, residual, out_scale, out_dtype
):
    codes, scale = triton_codes(x, x_scale)
    rest = (out_features, bias, activation, gate, residual, out_scale, out_dtype)
    return run_triton(codes, scale, weight, weight_scale, 0, torch.int8, *rest)


def quantized(weight: torch.Tensor, layout: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scales and sums of a float weight [N, K], with one scale per row."""
    scale = (weight.abs().amax(1) / 127 if weight.shape[1] else weight.new_zeros(weight.shape[0])).clamp(min=1e-30)
    codes = torch.round(weight / scale[:, None]).clamp(-127, 127).to(torch.int8)
    return pack(codes, layout), scale, weight_sums(codes)


@linear_w8a8.sample
def _(device):
    for layout in layouts(device):
        yield from _samples(device, layout)


def _samples(device, layout):
    one = lambda value: torch.tensor([value], device=device)
    for k, s in enumerate(samples(device)):
        rest = (*quantized(s.weight, layout), s.out_features, s.bias, s.activation, s.gate, s.residual)
        yield s.x, None, *rest, None, s.out_dtype
        if k % 3 == 0:
            yield s.x, one(0.03), *rest, one(0.05), torch.int8
        if k % 3 == 1 and s.x.isfinite().all():
            codes, scale = quantize_rows(s.x, None)
            yield codes.to(torch.int8), scale[..., 0].contiguous(), *rest, None, s.out_dtype
        if k % 3 == 2:
            yield (
                torch.round(s.x.float() * 30).clamp(-127, 127).to(torch.int8),
                one(0.03),
                *rest,
                one(0.05),
                torch.int8,
            )
