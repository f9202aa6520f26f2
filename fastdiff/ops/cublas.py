"""Matrix products by cuBLAS through torch, where nothing but a bias follows them."""

import torch
import torch.nn.functional as F

from fastdiff.ops.linear_call import row_stride
from fastdiff.ops.onednn import prepacked
from fastdiff.ops.packing import refuse_panels


def cublas_missing() -> str | None:
    """Why cuBLAS cannot run here at all, or None."""
    return None if torch.cuda.is_available() else "torch sees no CUDA GPU"


def refuse_linear(x, weight, out_features, bias, activation, gate, residual, out_dtype) -> str | None:
    """Why cuBLAS cannot serve this call of `linear`, or None."""
    if activation != "none" or gate is not None or residual is not None:
        return "adds nothing but a bias in the same pass"
    if not x.dtype == weight.dtype == out_dtype or weight.dtype == torch.float64:
        return f"multiplies and returns the weight's dtype, {weight.dtype}"
    if x.numel() == 0 or weight.numel() == 0:
        return "x and weight must have elements"
    return refuse_panels(weight)


def run_linear(x, weight, out_features, bias, activation, gate, residual, out_dtype) -> torch.Tensor:
    """`linear` by cuBLAS. The bias is rounded to the weight's dtype.

    torch.backends.cuda.matmul decides whether float32 becomes TF32, and whether parts of a sum are rounded to 16 bits.
    """
    K = x.shape[-1]
    rows = x.as_strided((x.numel() // K, K), (row_stride(x), 1))
    if bias is not None and bias.dtype != weight.dtype:
        make = lambda bias=bias: bias.to(weight.dtype)
        # what a graph's capture makes has no values before the graph runs, so nothing else may use it
        capturing = bias.is_cuda and torch.cuda.is_current_stream_capturing()
        bias = make() if capturing else prepacked(bias, (weight.dtype,), make)
    return F.linear(rows, weight[:out_features, :K], bias).view(*x.shape[:-1], out_features)
