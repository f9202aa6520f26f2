"""A linear layer on int8 weights and float activations: for weights that are read from memory more often than multiplied."""

import torch
import torch.nn.functional as F

from fastdiff.ops import native
from fastdiff.ops.linear_call import (
    FLOATS,
    check_call,
    check_scales,
    columns,
    finish,
    refuse_triton,
    rounded,
    run,
    run_triton,
)
from fastdiff.ops.linear_samples import layouts, samples
from fastdiff.ops.linear_w8a8 import quantized
from fastdiff.ops.packing import holds, padded_columns, refuse_rows, unpack
from fastdiff.ops.registry import op


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"linear_w8a16: x must be a float, got {x.dtype}")
    if weight.dtype != torch.int8 or not holds(weight, x.shape[-1]):
        raise ValueError(f"linear_w8a16: weight must be packed int8 of [N, {x.shape[-1]}], got {list(weight.shape)}")
    check_scales("linear_w8a16", weight_scale, padded_columns(weight), out_features, activation)
    check_call(
        "linear_w8a16", x, out_features, padded_columns(weight), activation, bias, gate, residual, None, out_dtype
    )


@op(check=_check)
def linear_w8a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Computes residual + gate * activation(weight_scale * (x @ codes of W.T) + bias) in one pass.

    x             [..., K] float32, float16 or bfloat16; rows with one stride
    weight        codes of W [N, K] in [-127, 127], packed by `packing.pack`; for pairs by `packing.pack_pairs`
    weight_scale  [N] float32; for pairs interleaved like the weight, as is bias
    out           [..., N] out_dtype (N / 2 for pairs)

    out_features, bias, activation, gate and residual as in `linear`. Products accumulate in float32; float16 is rounded to
    bfloat16 first, on a CPU.
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    padded = padded_columns(weight)
    y = rounded(x).to(wide) @ unpack(weight, padded, x.shape[-1]).to(wide).T
    y = y * F.pad(weight_scale, (0, padded - weight_scale.numel()))
    return finish(y, columns(out_features, activation), bias, activation, gate, residual, None, out_dtype)


def _refuse(x, weight, weight_scale, *rest):
    if x.dtype == torch.float64 or weight_scale.dtype != torch.float32 or rest[-1] == torch.float64:
        return "computes in float32"
    return refuse_rows(weight)


@linear_w8a16.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, weight, weight_scale, out_features, bias, activation, gate, residual, out_dtype):
    return run(
        native.cpu().linear_w8a16, x, None, weight, weight_scale, None, 0, out_features, bias, activation, gate, residual,
        None, out_dtype,
    )  # fmt: skip


def _refuse_triton(x, weight, weight_scale, *rest):
    return refuse_triton(x, weight, rest[-1], weight_scale)


@linear_w8a16.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(x, weight, weight_scale, out_features, bias, activation, gate, residual, out_dtype):
    rest = (out_features, bias, activation, gate, residual, None, out_dtype)
    return run_triton(x, None, weight, weight_scale, 0, x.dtype, *rest)


@linear_w8a16.sample
def _(device):
    for layout in layouts(device):
        for s in samples(device):
            packed, scale, _ = quantized(s.weight, layout)
            yield s.x, packed, scale, s.out_features, s.bias, s.activation, s.gate, s.residual, s.out_dtype
