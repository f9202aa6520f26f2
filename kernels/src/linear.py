"""The linear layers in Triton: contracts in `fastdiff/ops/linear*.py`. One kernel for all types of x and of weights."""

import triton
import triton.language as tl

from fastdiff.kernels.attention import operand
from fastdiff.kernels.linear_epilogue import finish_in_parts
from fastdiff.kernels.rounding import INTERPRETED, product

BAND = tl.constexpr(8)  # tiles of rows that programs visit together: they share the weights of a column in L2


@triton.jit(do_not_specialize=["rows", "gate_rows"])
def linear_kernel(
    x,
    weight,
    x_scale_ptr,
    scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    rows,
    K,
    N,
    wide,
    padded,
    group,
    x_stride,
    weight_stride,
    x_scale_step,
    gate_rows,
    gate_stride,
    residual_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUPED: tl.constexpr,
    TURNED: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    KIND: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program: BLOCK_M rows of x times BLOCK_N columns of the weight, then the epilogue on them.

    DTYPE    what is multiplied: x and codes of weights are cast to it; int8 adds up in int32
    GROUPED  scale [wide, K / group] multiplies the sums of BLOCK_K, a divisor of group; else scale [wide] follows
    TURNED   weights are the left operand, which can come from registers: for weights that are decoded, and for few rows
    EVEN     BLOCK_K divides K
    TMA      x and weight are descriptors of [rows, K] and [padded, K], else pointers
    """
    tile_m, tile_n = _tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(padded, BLOCK_N))
    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_place, weight_place, scales = x, weight, scale_ptr
    if not TMA:
        # what is beyond the last row or column repeats it: no masks in the loop
        x_place += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride
        weight_place += tl.minimum(column, padded - 1).to(tl.int64)[:, None] * weight_stride
    if GROUPED:
        scales += tl.minimum(column, wide - 1).to(tl.int64) * (K // group)
    SUMS: tl.constexpr = tl.int32 if DTYPE == tl.int8 and not GROUPED else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M) if TURNED else (BLOCK_M, BLOCK_N), SUMS)
    full = K if EVEN or TMA else K // BLOCK_K * BLOCK_K
    for k in tl.range(0, full, BLOCK_K):
        # fmt: off
        acc = _step(
            acc, x_place, weight_place, scales, tile_m * BLOCK_M, tile_n * BLOCK_N, k, K, group,
            BLOCK_K, DTYPE, GROUPED, TURNED, TMA, False,
        )
        # fmt: on
    if not EVEN and not TMA:
        # fmt: off
        acc = _step(
            acc, x_place, weight_place, scales, tile_m * BLOCK_M, tile_n * BLOCK_N, full, K, group,
            BLOCK_K, DTYPE, GROUPED, TURNED, TMA, True,
        )
        # fmt: on
    if TURNED:
        acc = tl.trans(acc)
    # fmt: off
    finish_in_parts(
        acc, row, tile_n * BLOCK_N, rows, N, wide, x_scale_ptr, None if GROUPED else scale_ptr, bias_ptr, gate_ptr,
        residual_ptr, out_scale_ptr, out_ptr, x_scale_step, gate_rows, gate_stride, residual_stride, KIND, PAIRS, PARTS,
    )
    # fmt: on


@triton.jit
def _tile(program, tiles_m, tiles_n):
    """The tile of a program: bands of BAND tiles of rows, in each column after column."""
    band = program // (BAND * tiles_n)
    inside, height = program % (BAND * tiles_n), tl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + inside % height, inside // height


@triton.jit
def _step(
    acc,
    x,
    weight,
    scales,
    first_row,
    first_column,
    k,
    K,
    group,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUPED: tl.constexpr,
    TURNED: tl.constexpr,
    TMA: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Adds the products of k .. k + BLOCK_K - 1; CHECK: only those below K exist."""
    if TMA:
        a, b = x.load([first_row, k]), weight.load([first_column, k])
    else:
        at = k + tl.arange(0, BLOCK_K)[None, :]
        if CHECK:
            a = tl.load(x + at, mask=at < K, other=0)
        else:
            a = tl.load(x + at)
        b = _codes(weight, k, K, BLOCK_K, CHECK)
    a, b = operand(a, DTYPE), decoded(b, DTYPE)
    if TURNED:
        a, b = b, a
    if GROUPED:
        scale = tl.load(scales + k // group)
        if not TMA and weight.dtype.element_ty == tl.uint8:
            scale *= 0.0625
        part = _product(a, tl.trans(b), None, DTYPE).to(tl.float32)
        acc += part * (scale[:, None] if TURNED else scale[None, :])
    else:
        acc = _product(a, tl.trans(b), acc, DTYPE)
    return acc


@triton.jit
def _codes(weight, k, K, BLOCK_K: tl.constexpr, CHECK: tl.constexpr):
    """Elements k .. k + BLOCK_K - 1 of rows of a weight, or the bytes that hold them as halves."""
    if weight.dtype.element_ty == tl.uint8:
        codes = tl.load(weight + (k // 2 + tl.arange(0, BLOCK_K // 2))[None, :])
    elif CHECK:
        at = k + tl.arange(0, BLOCK_K)[None, :]
        codes = tl.load(weight + at, mask=at < K, other=0)
    else:
        codes = tl.load(weight + (k + tl.arange(0, BLOCK_K))[None, :])
    return codes


@triton.jit
def decoded(codes, DTYPE: tl.constexpr):
    """Weights in DTYPE, exactly; of halves of bytes 16 times the code, which an int8 holds in its upper half."""
    if codes.dtype == tl.uint8:
        low, high = (codes << 4).to(tl.int8, bitcast=True), (codes & 0xF0).to(tl.int8, bitcast=True)
        codes = tl.join(low, high).reshape(codes.shape[0], 2 * codes.shape[1])
    return exactly(codes, DTYPE)


@triton.jit
def exactly(codes, DTYPE: tl.constexpr):
    """Small integers in another type; the interpreter makes bfloat16 of float32 only."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        codes = codes.to(tl.float32)
    return codes.to(DTYPE)


@triton.jit
def _product(a, b, acc, DTYPE: tl.constexpr):
    if DTYPE == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        acc = product(a, b, acc, "ieee")
    return acc
