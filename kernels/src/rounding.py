"""Casts and int8 codes that round to nearest even, in the interpreter too."""

import os

import triton
import triton.language as tl

# the interpreter of Triton 3.6 cuts float32 down to bfloat16, wraps where e4m3 overflows, and multiplies bfloat16 wrongly
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# 1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to an integer, without libdevice
_ROUND = tl.constexpr(12582912.0)
_ONE_127TH = tl.constexpr(0.007874015718698502)  # float32(1 / 127), as in the reference
_MAGNITUDE, _INFINITY = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x as `dtype`; e4m3 (tl.float8e4nv) saturates."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), float("nan"))
    if INTERPRETED and dtype == tl.float8e4nv:
        x = _on_e4m3_grid(x)
    return x.to(dtype)


@triton.jit
def _on_e4m3_grid(x):
    """The nearest number with three fraction bits, or multiple of 2^-9 below 2^-6."""
    exponent = (x.to(tl.int32, bitcast=True) & _INFINITY) - (3 << 23)
    step = tl.maximum(exponent, (127 - 9) << 23).to(tl.float32, bitcast=True)
    return rint(x / step) * step


@triton.jit
def rint(x):
    """The nearest integer to |x| <= 2^22, ties to even."""
    return (x + _ROUND) - _ROUND


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b on tensor cores. PRECISION is that of float32 operands: "ieee", "tf32" or "tf32x3"."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def step_and_inverse(bits):
    """Of |x| as integer bits, the largest of a row: (what a code of 1 means, its reciprocal); (NaN, NaN) where not finite.

    Compared as integers, NaN is the largest: one reduction finds the largest value and whether all are finite.
    """
    largest = tl.where(bits < _INFINITY, bits.to(tl.float32, bitcast=True), float("nan"))
    inverse = tl.where(largest == 0.0, 0.0, tl.div_rn(tl.full(largest.shape, 127.0, tl.float32), largest))
    return largest * _ONE_127TH, inverse


@triton.jit
def magnitude_bits(x):
    """|x| of float32 as integers in the same order, NaN largest."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def int8_codes(x, inverse):
    """x * inverse to the nearest of -127 .. 127, ties to even; NaN to 0."""
    y = x * inverse
    y = tl.where(y == y, y, 0.0)
    # clamping first keeps the product from being contracted with the addition in rint
    return rint(tl.minimum(tl.maximum(y, -127.0), 127.0)).to(tl.int8)
