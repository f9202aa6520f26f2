"""`attention` and `attention_lse` in Triton: contracts in `fastdiff/ops/attention.py`.

Scores are kept in units of log 2, so that weights are exp2. Head dimensions that are no power of two are two products, of
HEAD and of TAIL elements: 72 = 64 + 16 wastes a tenth of the products where 128 wastes 44 %.
"""

import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast, product

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
NO_MASK, KEY_MASK, FULL_MASK = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
)  # one row for all queries, or one each
_PLAIN = ["queries", "keys", "heads", "share", "tiles", "mask_stride_b", "mask_stride_h", "mask_stride_n"]


@triton.jit(do_not_specialize=_PLAIN)
def attention_kernel(
    q,
    q_tail,
    k,
    k_tail,
    v,
    v_tail,
    mask_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    queries,
    keys,
    heads,
    share,
    tiles,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_m,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    POSITIVE: tl.constexpr,
    SINGLE: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Program (sample, head, tile of BLOCK_M queries); `share` heads of q have one of k.

    scale is that of scores in units of log 2; POSITIVE: above 0, and there is no mask.
    SINGLE: all keys are in one block. EVEN: blocks are always full. DTYPE: of the operands of q k^T, WEIGHTS: of those of p v.
    TMA: q, k, v and their tails are descriptors of [B, H, N, D] and the loop is split over warps (without mask and
    lengths); else they are pointers, and the tails None. Triton 3.6 splits only loops that have no condition around them.
    """
    program = tl.program_id(0)
    tile = program % tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    sample, head = program // tiles // heads, program // tiles % heads
    b, h, kv = sample.to(tl.int64), head.to(tl.int64), head // share
    if not TMA:
        q += b * q_stride_b + h * q_stride_h
        k += b * k_stride_b + kv.to(tl.int64) * k_stride_h
        v += b * v_stride_b + kv.to(tl.int64) * v_stride_h
    q0 = _read(q, q_stride_n, sample, head, tile * BLOCK_M, row, queries, D, 0, HEAD, TMA, True)
    q0 = operand(q0, DTYPE)
    q1, acc1 = q0, 0.0
    acc0 = tl.zeros((BLOCK_M, HEAD), tl.float32)
    if TAIL > 0:
        q_source = q_tail if TMA else q
        q1 = _read(q_source, q_stride_n, sample, head, tile * BLOCK_M, row, queries, D, HEAD, TAIL, TMA, True)
        q1 = operand(q1, DTYPE)
        acc1 = tl.zeros((BLOCK_M, TAIL), tl.float32)
    mask, mask_row = mask_ptr, 0
    if MASK != NO_MASK:
        mask += b * mask_stride_b + h * mask_stride_h
    if MASK == FULL_MASK:
        # a query beyond the last reads the last one's row
        mask_row = tl.minimum(row, queries - 1).to(tl.int64)[:, None] * mask_stride_n
    limit = keys
    if lengths_ptr is not None:
        limit = tl.minimum(keys, tl.load(lengths_ptr + b))

    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if TMA:
        for first in tl.range(0, limit, BLOCK_N, warp_specialize=True):
            # fmt: off
            acc0, acc1, top, total = _block(
                acc0, acc1, top, total, q0, q1, k, k_tail, v, v_tail, mask, mask_row, k_stride_n, v_stride_n, mask_stride_m,
                sample, kv, first, limit, scale, D, HEAD, TAIL, BLOCK_N, MASK, POSITIVE, DTYPE, WEIGHTS, PRECISION,
                True, not EVEN,
            )
            # fmt: on
    else:
        first = 0
        if not SINGLE:
            for first in tl.range(0, limit - BLOCK_N + 1, BLOCK_N):
                # fmt: off
                acc0, acc1, top, total = _block(
                    acc0, acc1, top, total, q0, q1, k, k, v, v, mask, mask_row, k_stride_n, v_stride_n, mask_stride_m,
                    sample, kv, first, limit, scale, D, HEAD, TAIL, BLOCK_N, MASK, POSITIVE, DTYPE, WEIGHTS, PRECISION,
                    False, False,
                )
                # fmt: on
            first = limit // BLOCK_N * BLOCK_N
        if first < limit:
            # fmt: off
            acc0, acc1, top, total = _block(
                acc0, acc1, top, total, q0, q1, k, k, v, v, mask, mask_row, k_stride_n, v_stride_n, mask_stride_m,
                sample, kv, first, limit, scale, D, HEAD, TAIL, BLOCK_N, MASK, POSITIVE, DTYPE, WEIGHTS, PRECISION,
                False, True,
            )
            # fmt: on

    inverse = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # a query without keys gives 0
    target = out_ptr + (b * queries * heads + h) * D
    store_rows(target, heads * D, row, queries, acc0 * inverse, D, 0, HEAD)
    if TAIL > 0:
        store_rows(target, heads * D, row, queries, acc1 * inverse, D, HEAD, TAIL)
    if lse_ptr is not None:
        store_lse(lse_ptr + (b * heads + h) * queries, row, queries, top, total)


@triton.jit
def _block(
    acc0,
    acc1,
    top,
    total,
    q0,
    q1,
    k,
    k_tail,
    v,
    v_tail,
    mask,
    mask_row,
    k_stride_n,
    v_stride_n,
    mask_stride_m,
    sample,
    kv,
    first,
    limit,
    scale,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    POSITIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Adds keys first .. first + BLOCK_N - 1; CHECK: only those below limit exist."""
    key = first + tl.arange(0, BLOCK_N)
    k0 = operand(_read(k, k_stride_n, sample, kv, first, key, limit, D, 0, HEAD, TMA, CHECK), DTYPE)
    s = product(q0, tl.trans(k0), tl.zeros((q0.shape[0], BLOCK_N), tl.float32), PRECISION)
    if TAIL > 0:
        k1 = operand(_read(k_tail, k_stride_n, sample, kv, first, key, limit, D, HEAD, TAIL, TMA, CHECK), DTYPE)
        s = product(q1, tl.trans(k1), s, PRECISION)
    if not POSITIVE:
        s *= scale
    if MASK != NO_MASK:
        s = masked(s, mask, mask_row, key, limit, mask_stride_m)
    if CHECK:
        s = tl.where((key < limit)[None, :], s, float("-inf"))
    p, top, total, shrink = soften(s, top, total, scale, POSITIVE)
    p = operand(p, WEIGHTS)
    v0 = operand(_read(v, v_stride_n, sample, kv, first, key, limit, D, 0, HEAD, TMA, CHECK), WEIGHTS)
    acc0 = product(p, v0, acc0 * shrink[:, None], PRECISION)
    if TAIL > 0:
        v1 = operand(_read(v_tail, v_stride_n, sample, kv, first, key, limit, D, HEAD, TAIL, TMA, CHECK), WEIGHTS)
        acc1 = product(p, v1, acc1 * shrink[:, None], PRECISION)
    return acc0, acc1, top, total


@triton.jit
def masked(s, mask, mask_row, key, limit, mask_stride_m):
    """Scores with a boolean (uint8) or additive mask; mask_row is 0 where all queries share one row."""
    place = mask_row + key.to(tl.int64)[None, :] * mask_stride_m
    value = tl.load(mask + place, mask=(key < limit)[None, :] & (place >= 0), other=0)
    if value.dtype == tl.uint8:
        s = tl.where(value != 0, s, float("-inf"))
    else:
        s += value.to(tl.float32) * LOG2E
    return s


@triton.jit
def soften(s, top, total, scale, POSITIVE: tl.constexpr):
    """exp2 of scores below the running maximum, (that, the running sum, and by how much earlier weights shrink).

    POSITIVE: s still has to be multiplied by scale > 0, one for all queries or one each, which costs nothing in the
    multiply-add of the exponent.
    """
    scale += tl.zeros_like(top)
    if POSITIVE:
        above = tl.maximum(top, tl.max(s, axis=1) * scale)
    else:
        above = tl.maximum(top, tl.max(s, axis=1))
    origin = tl.where(above == float("-inf"), 0.0, above)
    if POSITIVE:
        p = tl.exp2(s * scale[:, None] - origin[:, None])
    else:
        p = tl.exp2(s - origin[:, None])
    shrink = tl.exp2(top - origin)
    return p, above, total * shrink + tl.sum(p, axis=1), shrink


@triton.jit
def operand(x, dtype: tl.constexpr):
    if x.dtype != dtype:
        x = cast(x.to(tl.float32), dtype)
    return x


@triton.jit
def _read(
    source,
    stride,
    sample,
    head,
    first,
    row,
    limit,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Elements FIRST .. FIRST + WIDTH - 1 of rows, 0 from D on. Rows from `limit` on: 0 with TMA, and where CHECK."""
    if TMA:
        x = source.load([sample, head, first, FIRST]).reshape(row.shape[0], WIDTH)
    else:
        d = FIRST + tl.arange(0, WIDTH)[None, :]
        place = source + row.to(tl.int64)[:, None] * stride + d
        if CHECK and FIRST + WIDTH > D:
            x = tl.load(place, mask=(row < limit)[:, None] & (d < D), other=0.0)
        elif CHECK:
            x = tl.load(place, mask=(row < limit)[:, None], other=0.0)
        elif FIRST + WIDTH > D:
            x = tl.load(place, mask=(row >= 0)[:, None] & (d < D), other=0.0)
        else:
            x = tl.load(place)
    return x


@triton.jit
def store_rows(base, stride, row, limit, x, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)[None, :]
    place = base + row.to(tl.int64)[:, None] * stride + d
    tl.store(place, cast(x, base.dtype.element_ty), mask=(row < limit)[:, None] & (d < D))


@triton.jit
def store_lse(base, row, limit, top, total):
    """Log of the sum of exponentials, in natural units; -inf for a query without keys."""
    lse = (tl.where(top == float("-inf"), 0.0, top) + tl.log2(total)) * LN2
    tl.store(base + row, lse, mask=row < limit)
