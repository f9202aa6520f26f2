"""A linear layer on packed float weights with everything around it: bias, activation, gate, residual."""

import torch

from fastdiff.ops import cublas, native, onednn
from fastdiff.ops.linear_call import FLOATS, check_call, columns, finish, refuse_triton, run, run_triton
from fastdiff.ops.linear_samples import BF16, F16, F32, layouts, samples
from fastdiff.ops.packing import holds, pack, padded_columns, refuse_rows, unpack
from fastdiff.ops.registry import op


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if x.dtype not in FLOATS or weight.dtype not in FLOATS:
        raise TypeError(f"linear: x and weight must be floats, got {x.dtype} and {weight.dtype}")
    if not holds(weight, x.shape[-1]):
        raise ValueError(f"linear: weight must be packed from [N, {x.shape[-1]}], got {list(weight.shape)}")
    check_call("linear", x, out_features, padded_columns(weight), activation, bias, gate, residual, None, out_dtype)


@op(check=_check)
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Computes residual + gate * activation(x @ W.T + bias) in one pass.

    x             [..., K] float32, float16 or bfloat16; rows with one stride
    weight        W [N, K] packed by `packing.pack`, bfloat16, float32 or (in rows) float16; for pairs [value; gate] by
                  `packing.pack_pairs`
    out_features  N, for pairs 2 x the columns of the result
    bias          [N] float32; for pairs interleaved like the weight
    activation    "none", "gelu", "gelu_tanh", "silu"; pairs: "geglu", "geglu_tanh" (value * gelu(gate)), "swiglu"
    gate          [B, N] any float: row r of x takes row r // (rows / B); rows may be strided
    residual      [..., N] any float, rows with one stride
    out           [..., N] out_dtype (N / 2 for pairs)

    Products accumulate in float32; with a 16-bit weight x is rounded to its dtype first. The epilogue is float32.
    A row's bits do not depend on the others; on a GPU they may on how many there are. No rows give an empty result;
    K = 0 gives what an x of zeros would.
    """
    wide = torch.promote_types(torch.float32, x.dtype)
    rounded = x.to(weight.dtype) if weight.dtype in (torch.bfloat16, torch.float16) else x
    y = rounded.to(wide) @ unpack(weight, padded_columns(weight), x.shape[-1]).to(wide).T
    return finish(y, columns(out_features, activation), bias, activation, gate, residual, None, out_dtype)


def _refuse(x, weight, *rest):
    if x.dtype == torch.float64 or weight.dtype not in (torch.float32, torch.bfloat16) or rest[-1] == torch.float64:
        return "computes in float32 with a float32 or bfloat16 weight"
    return refuse_rows(weight)


@linear.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(x, weight, out_features, bias, activation, gate, residual, out_dtype):
    kernel = native.cpu().linear
    return run(kernel, x, None, weight, None, None, 0, out_features, bias, activation, gate, residual, None, out_dtype)


def _refuse_onednn(x, weight, *rest):
    return refuse_rows(weight) or onednn.refuse_linear(x, weight, *rest)


linear.variant("onednn", ("cpu",), onednn.onednn_missing, _refuse_onednn)(onednn.run_linear)
linear.variant("cublas", ("cuda",), cublas.cublas_missing, cublas.refuse_linear)(cublas.run_linear)


def _refuse_triton(x, weight, *rest):
    return refuse_triton(x, weight, rest[-1])


@linear.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(x, weight, out_features, bias, activation, gate, residual, out_dtype):
    rest = (out_features, bias, activation, gate, residual, None, out_dtype)
    return run_triton(x, None, weight, None, 0, weight.dtype, *rest)


@linear.sample
def _(device):
    for layout in layouts(device):
        for weight_dtype in (F32, BF16):
            yield from _samples(device, weight_dtype, layout)
    yield from list(_samples(device, F16, "rows"))[4::3]


def _samples(device, weight_dtype, layout):
    for s in samples(device):
        packed = pack(s.weight.to(weight_dtype), layout)
        yield s.x, packed, s.out_features, s.bias, s.activation, s.gate, s.residual, s.out_dtype
