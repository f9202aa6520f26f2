"""What linear layers prepare before they multiply: weights in the type of the product, codes of x with a given scale."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.linear import decoded, exactly
from fastdiff.kernels.rounding import cast, int8_codes

ROWS, BYTES = 16, 256  # of a weight, per program
BLOCK = 1024
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["groups"])
def linear_expand_kernel(
    weight_ptr, scale_ptr, out_ptr, wide, stride, out_stride, group, groups, ROWS: tl.constexpr, BYTES: tl.constexpr
):
    """Program (ROWS rows, BYTES bytes of each): codes as out's type, times scale [wide, groups] where there is one.

    weight  [rows, stride] int8 codes, or uint8 halves of bytes; rows a multiple of 16
    out     [rows, out_stride]: int8 or float
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    HALVES: tl.constexpr = weight_ptr.dtype.element_ty == tl.uint8
    EACH: tl.constexpr = 2 if HALVES else 1
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    at = tl.program_id(1) * (EACH * BYTES) + tl.arange(0, EACH * BYTES)
    codes = tl.load(weight_ptr + row[:, None] * stride + byte[None, :], mask=(byte < stride)[None, :], other=0)
    target, inside = out_ptr + row[:, None] * out_stride + at[None, :], (at < out_stride)[None, :]
    codes = decoded(codes, tl.int8)
    if HALVES:
        codes = codes >> 4
    if scale_ptr is None:
        tl.store(target, exactly(codes, out_ptr.dtype.element_ty), mask=inside)
    else:
        used = (row < wide)[:, None] & (at < groups * group)[None, :]
        scale = tl.load(scale_ptr + row[:, None] * groups + at[None, :] // group, mask=used, other=0.0)
        tl.store(target, cast(codes.to(tl.float32) * scale, out_ptr.dtype.element_ty), mask=inside)


def expand(weight: torch.Tensor, scale: torch.Tensor | None, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes of a packed weight in `dtype`, times scale [wide, K / group] where given: [N padded to 16, K padded]."""
    rows, stride = weight.shape
    width = stride * (2 if weight.dtype == torch.uint8 else 1)
    out = torch.empty(rows, width, dtype=dtype, device=weight.device)
    wide, groups = (rows, 1) if scale is None else scale.shape
    if out.numel():
        linear_expand_kernel[(rows // ROWS, triton.cdiv(stride, BYTES))](
            *(weight, scale, out, wide, stride, width, group, groups), ROWS=ROWS, BYTES=BYTES, **OPTIONS
        )
    return out


@triton.jit
def linear_codes_kernel(x_ptr, scale_ptr, codes_ptr, K, x_stride, BLOCK: tl.constexpr):
    """Program (row, BLOCK elements): codes of x with the scale [1]; NaN is -127."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    x = tl.load(x_ptr + row * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
    tl.store(codes_ptr + row * K + at, int8_codes(tl.where(x == x, x, float("-inf")), inverse), mask=at < K)


def static_codes(x: torch.Tensor, scale: torch.Tensor, x_stride: int) -> torch.Tensor:
    """Codes [..., K] of float rows that are x_stride elements apart, with a scale [1]."""
    K = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if codes.numel():
        grid = (codes.numel() // K, triton.cdiv(K, BLOCK))
        linear_codes_kernel[grid](x, scale, codes, K, x_stride, BLOCK=BLOCK, **OPTIONS)
    return codes
