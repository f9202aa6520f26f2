"""`qk_norm_rope` in Triton: contract in `fastdiff/ops/qk_norm_rope.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast

ELEMENTS = 1024  # of one program: heads of one token, so that they share cosines and sines
OPTIONS = {"num_warps": 2}  # 16 bytes of bfloat16 a thread in each half of a head


@triton.jit(do_not_specialize=["tokens", "heads", "tiles"])
def qk_norm_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    heads,
    n,
    half,
    tiles,
    x_stride_b,
    x_stride_n,
    x_stride_h,
    cos_stride_b,
    cos_stride_n,
    sin_stride_b,
    sin_stride_n,
    out_stride_b,
    eps,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program (sample, token, tile of HEADS heads). Pairs (a, b) of elements turn into (a cos - b sin, b cos + a sin).

    Without cosines the pairs are halves all the same. `half` is n / 2 rounded up, an argument because its divisibility
    by 16 makes loads of the second halves wide.
    """
    program = tl.program_id(0)
    row = program // tiles
    b, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    head = (program % tiles) * HEADS + tl.arange(0, HEADS)[:, None]
    exists = head < heads
    source = x_ptr + b * x_stride_b + token * x_stride_n + head * x_stride_h
    target = out_ptr + b * out_stride_b + (token * heads + head) * n
    x0, x1 = _pairs(source, exists, n, half, HEADS, PAIRS, INTERLEAVED)
    x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(x0 * x0, axis=1) + tl.sum(x1 * x1, axis=1)) / n + eps)[:, None]
        x0, x1 = x0 * inverse, x1 * inverse
    one = tl.zeros((1, 1), tl.int32)
    if weight_ptr is not None:
        w0, w1 = _pairs(weight_ptr + one, one == 0, n, half, 1, PAIRS, INTERLEAVED)
        x0, x1 = x0 * w0.to(tl.float32), x1 * w1.to(tl.float32)
    if cos_ptr is not None:
        c0, c1 = _pairs(
            cos_ptr + b * cos_stride_b + token * cos_stride_n + one, one == 0, n, half, 1, PAIRS, INTERLEAVED
        )
        s0, s1 = _pairs(
            sin_ptr + b * sin_stride_b + token * sin_stride_n + one, one == 0, n, half, 1, PAIRS, INTERLEAVED
        )
        y0 = x0 * c0.to(tl.float32) - x1 * s0.to(tl.float32)
        x1 = x1 * c1.to(tl.float32) + x0 * s1.to(tl.float32)
        x0 = y0
    _store_pairs(target, exists, n, half, x0, x1, HEADS, PAIRS, INTERLEAVED)


@triton.jit
def _pairs(rows, exists, n, half, ROWS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second elements [ROWS, PAIRS] of the pairs of rows [ROWS, 1]; 0 outside."""
    if INTERLEAVED:
        at = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(rows + at, mask=exists & (at < n), other=0.0)
        first, second = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    else:
        at = tl.arange(0, PAIRS)[None, :]
        first = tl.load(rows + at, mask=exists & (at < half), other=0.0)
        second = tl.load(rows + half + at, mask=exists & (at < n - half), other=0.0)
    return first, second


@triton.jit
def _store_pairs(
    rows, exists, n, half, first, second, ROWS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    dtype: tl.constexpr = rows.dtype.element_ty
    if INTERLEAVED:
        at = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(cast(first, dtype), cast(second, dtype)), (ROWS, 2 * PAIRS))
        tl.store(rows + at, x, mask=exists & (at < n))
    else:
        at = tl.arange(0, PAIRS)[None, :]
        tl.store(rows + at, cast(first, dtype), mask=exists & (at < half))
        tl.store(rows + half + at, cast(second, dtype), mask=exists & (at < n - half))


def heads_and_pairs(heads: int, n: int) -> tuple[int, int]:
    """HEADS and PAIRS for heads of n elements."""
    pairs = max(triton.next_power_of_2(n) // 2, 16)
    return min(max(ELEMENTS // (2 * pairs), 1), triton.next_power_of_2(heads)), pairs


def qk_norm_rope_triton(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> None:
    """Fills out [B, N, H, D], the tokens of a sample one after another."""
    B, N, H, D = x.shape
    if x.numel() == 0:
        return
    HEADS, PAIRS = heads_and_pairs(H, D)
    tiles = triton.cdiv(H, HEADS)
    steps = lambda v: (0, 0) if v is None else (0, *v.stride())[-3:-1]  # of sample and token
    qk_norm_rope_kernel[(B * N * tiles,)](
        *(x, weight, cos, sin, out, N, H, D, (D + 1) // 2, tiles, *x.stride()[:3], *steps(cos), *steps(sin)),
        out.stride(0),
        0.0 if eps is None else eps,
        NORM=eps is not None,
        INTERLEAVED=interleaved and cos is not None,
        HEADS=HEADS,
        PAIRS=PAIRS,
        **OPTIONS,
    )
