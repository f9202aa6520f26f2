"""A linear layer on 4-bit weights with a scale per group of k, and float activations."""

import torch

from fastdiff.ops import native
from fastdiff.ops.linear_call import check_call, columns, finish, rounded, run, run_triton
from fastdiff.ops.linear_int4 import check_int4, group_sums, quantized_int4, refuse_triton_int4
from fastdiff.ops.linear_samples import layouts, samples
from fastdiff.ops.packing import padded_columns, refuse_rows
from fastdiff.ops.registry import op


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_features: int,
    group: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_int4("linear_w4a16", x, weight, weight_scale, group, out_features, activation)
    check_call(
        "linear_w4a16", x, out_features, padded_columns(weight), activation, bias, gate, residual, None, out_dtype
    )


@op(check=_check)
def linear_w4a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_features: int,
    group: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Computes residual + gate * activation(sum over groups of weight_scale * (x @ codes of W.T) + bias) in one pass.

    x             [..., K] float32, float16 or bfloat16; rows with one stride
    weight        codes of W [N, K] in [-8, 7], packed by `packing.pack_int4`; for pairs by `packing.pack_pairs_int4`
    weight_scale  [N, K / group] float32; for pairs interleaved like the weight, as is bias
    group         k that share a scale: 32, 64, 128 or another multiple of 8 that divides K
    out           [..., N] out_dtype (N / 2 for pairs)

    out_features, bias, activation, gate and residual as in `linear`. Products accumulate in float32, at
    most 128 k before they are scaled; float16 is rounded to bfloat16 first. On a GPU float16 stays what it is, and where
    a 16-bit result has more than 64 rows, codes times their scales are rounded to 16 bits before they are multiplied.
    """
    y = group_sums(rounded(x), weight, weight_scale, group)
    return finish(y, columns(out_features, activation), bias, activation, gate, residual, None, out_dtype)


def _refuse(x, weight, weight_scale, *rest):
    if x.dtype == torch.float64 or weight_scale.dtype != torch.float32 or rest[-1] == torch.float64:
        return "computes in float32"
    return refuse_rows(weight)


@linear_w4a16.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, weight, weight_scale, out_features, group, bias, activation, gate, residual, out_dtype):
    return run(
        native.cpu().linear_w4a16, x, None, weight, weight_scale, None, group, out_features, bias, activation, gate, residual,
        None, out_dtype,
    )  # fmt: skip


@linear_w4a16.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=refuse_triton_int4)
def _(x, weight, weight_scale, out_features, group, bias, activation, gate, residual, out_dtype):
    rest = (out_features, bias, activation, gate, residual, None, out_dtype)
    return run_triton(x, None, weight, weight_scale, group, x.dtype, *rest)


@linear_w4a16.sample
def _(device):
    for layout in layouts(device):
        for k, group in enumerate((32, 64, 128, 8, 192)):
            for s in list(samples(device, group))[k % 3 :: 3]:
                packed, scale = quantized_int4(s.weight, group, layout)
                yield s.x, packed, scale, s.out_features, group, s.bias, s.activation, s.gate, s.residual, s.out_dtype
