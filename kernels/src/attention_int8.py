"""`attention` with precision "int8" in Triton: codes of q per token, of k minus its mean per block of keys (Zhang et al. 2024).

k minus its mean over the tokens has no large channels, and moves all scores of a query alike. q is coded in the kernel
that uses it; k and v are coded by two launches before. v minus its mean is e4m3 with a scale per channel where the GPU
multiplies that (sm_89, sm_90, sm_120) and keys are many, else 16 bits; weights likewise.
"""

import triton
import triton.language as tl

from fastdiff.kernels.attention import FULL_MASK, NO_MASK, masked, operand, soften, store_lse, store_rows
from fastdiff.kernels.rounding import cast, int8_codes, magnitude_bits, product, step_and_inverse

E4M3_MAX = tl.constexpr(448.0)
_PLAIN = ["queries", "keys", "heads", "share", "tiles", "blocks", "piece", "padded"]
_PLAIN += ["mask_stride_b", "mask_stride_h", "mask_stride_n"]


@triton.jit(do_not_specialize=_PLAIN)
def attention_means_kernel(
    k_ptr,
    v_ptr,
    lengths_ptr,
    sums_ptr,
    keys,
    heads,
    piece,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Program (sample, head, piece of the keys): sums of k and v and the extremes of v per channel, sums[4, ., piece, D]."""
    program = tl.program_id(0)
    at, row = program % PIECES, program // PIECES
    b, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    limit = keys
    if lengths_ptr is not None:
        limit = tl.minimum(keys, tl.load(lengths_ptr + b))
    last = tl.minimum(at * piece + piece, limit)
    k = k_ptr + b * k_stride_b + head * k_stride_h + d
    v = v_ptr + b * v_stride_b + head * v_stride_h + d
    k_sum, v_sum = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    low, high = tl.full((ROWS, WIDTH), float("inf"), tl.float32), tl.full((ROWS, WIDTH), float("-inf"), tl.float32)
    for first in tl.range(at * piece, last, ROWS):
        token = (first + tl.arange(0, ROWS))[:, None]
        inside = (token < last) & (d < D)
        k_sum += tl.load(k + token.to(tl.int64) * k_stride_n, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(v + token.to(tl.int64) * v_stride_n, mask=inside, other=0.0).to(tl.float32)
        v_sum += x
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, float("-inf")))
    lane = tl.arange(0, WIDTH)
    target = sums_ptr + program.to(tl.int64) * D + lane
    plane = tl.num_programs(0).to(tl.int64) * D
    tl.store(target, tl.sum(k_sum, axis=0), mask=lane < D)
    tl.store(target + plane, tl.sum(v_sum, axis=0), mask=lane < D)
    tl.store(target + 2 * plane, tl.min(low, axis=0), mask=lane < D)
    tl.store(target + 3 * plane, tl.max(high, axis=0), mask=lane < D)


@triton.jit(do_not_specialize=_PLAIN)
def attention_codes_kernel(
    k_ptr,
    v_ptr,
    lengths_ptr,
    sums_ptr,
    codes_ptr,
    steps_ptr,
    values_ptr,
    v_scale_ptr,
    v_mean_ptr,
    k_mean_ptr,
    keys,
    heads,
    blocks,
    padded,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    v_stride_b,
    v_stride_n,
    v_stride_h,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Program (sample, head, block of keys): codes [., padded, WIDTH] of k, v transposed [., WIDTH, padded]; 0 beyond.

    The first block of a head also writes the scale and the mean of v and the mean of k, [., WIDTH]; the scale is 1 for 16-bit values.
    """
    program = tl.program_id(0)
    block, row = program % blocks, program // blocks
    b, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    d, token = tl.arange(0, PADDED_WIDTH), block * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = keys
    if lengths_ptr is not None:
        limit = tl.minimum(keys, tl.load(lengths_ptr + b))
    plane = (tl.num_programs(0) // blocks).to(tl.int64) * PIECES * D
    sums = sums_ptr + (row.to(tl.int64) * PIECES + tl.arange(0, PIECES)[:, None]) * D + d[None, :]
    used = (d < D)[None, :] & (tl.arange(0, PIECES) >= 0)[:, None]
    count = tl.maximum(limit, 1).to(tl.float32)
    k_mean = tl.sum(tl.load(sums, mask=used, other=0.0), axis=0) / count
    v_mean = tl.sum(tl.load(sums + plane, mask=used, other=0.0), axis=0) / count

    inside = (token < limit)[:, None] & (d < D)[None, :]
    place = token.to(tl.int64)[:, None]
    k = tl.load(k_ptr + b * k_stride_b + head * k_stride_h + place * k_stride_n + d[None, :], mask=inside, other=0.0)
    k = tl.where(inside, k.to(tl.float32) - k_mean[None, :], 0.0)
    step, inverse = step_and_inverse(tl.max(tl.max(magnitude_bits(k), axis=1), axis=0))
    tl.store(steps_ptr + program, step)
    target = codes_ptr + (row.to(tl.int64) * padded + place) * WIDTH + d[None, :]
    tl.store(target, int8_codes(k, inverse), mask=(d < WIDTH)[None, :] & (token >= 0)[:, None])

    v = tl.load(v_ptr + b * v_stride_b + head * v_stride_h + place * v_stride_n + d[None, :], mask=inside, other=0.0)
    v = tl.where(inside, v.to(tl.float32) - v_mean[None, :], 0.0)
    scale = tl.full((PADDED_WIDTH,), 1.0, tl.float32)
    if values_ptr.dtype.element_ty == tl.float8e4nv:
        low = tl.min(tl.load(sums + 2 * plane, mask=used, other=0.0), axis=0)
        high = tl.max(tl.load(sums + 3 * plane, mask=used, other=0.0), axis=0)
        largest = tl.maximum(high - v_mean, v_mean - low)
        scale = tl.where(largest > 0.0, largest * (1.0 / E4M3_MAX), 1.0)
        v = v / scale[None, :]
    values = values_ptr + (row.to(tl.int64) * WIDTH + d[:, None]) * padded + token[None, :]
    tl.store(values, tl.trans(cast(v, values_ptr.dtype.element_ty)), mask=(d < WIDTH)[:, None] & (token >= 0)[None, :])
    if block == 0:
        tl.store(v_scale_ptr + row * WIDTH + d, scale, mask=d < WIDTH)
        tl.store(v_mean_ptr + row * WIDTH + d, v_mean, mask=d < WIDTH)
        tl.store(k_mean_ptr + row * WIDTH + d, k_mean, mask=d < WIDTH)


@triton.jit(do_not_specialize=_PLAIN)
def attention_int8_kernel(
    q_ptr,
    codes,
    codes_tail,
    steps_ptr,
    values,
    values_tail,
    v_scale_ptr,
    v_mean_ptr,
    k_mean_ptr,
    mask_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    queries,
    keys,
    heads,
    share,
    tiles,
    blocks,
    padded,
    q_stride_b,
    q_stride_n,
    q_stride_h,
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
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Program (sample, head, tile of BLOCK_M queries), as attention_kernel; scores are q's step * k's step * their product.

    TMA: codes and values are descriptors of [B * Hkv, padded, WIDTH] and [B * Hkv, WIDTH, padded], else pointers.
    """
    program = tl.program_id(0)
    row = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    sample, head = program // tiles // heads, program // tiles % heads
    b, h = sample.to(tl.int64), head.to(tl.int64)
    group = sample * (heads // share) + head // share
    WIDTH: tl.constexpr = HEAD + TAIL
    WEIGHTS: tl.constexpr = values.dtype if TMA else values.dtype.element_ty
    q_row = q_ptr + b * q_stride_b + h * q_stride_h + row.to(tl.int64)[:, None] * q_stride_n
    q0, q1 = _queries(q_row, row < queries, D, 0, HEAD), 0.0
    bits = tl.max(magnitude_bits(q0), axis=1)
    if TAIL > 0:
        q1 = _queries(q_row, row < queries, D, HEAD, TAIL)
        bits = tl.maximum(bits, tl.max(magnitude_bits(q1), axis=1))
    q_step, inverse = step_and_inverse(bits)
    if lse_ptr is not None:
        # what the mean of k, which the codes lack, adds to all scores of a query
        d = tl.arange(0, HEAD)
        added = tl.sum(q0 * tl.load(k_mean_ptr + group * WIDTH + d)[None, :], axis=1)
        if TAIL > 0:
            d = HEAD + tl.arange(0, TAIL)
            added += tl.sum(q1 * tl.load(k_mean_ptr + group * WIDTH + d)[None, :], axis=1)
    q0, q_step = int8_codes(q0, inverse[:, None]), q_step * scale
    acc0, acc1 = tl.zeros((BLOCK_M, HEAD), tl.float32), 0.0
    if TAIL > 0:
        q1 = int8_codes(q1, inverse[:, None])
        acc1 = tl.zeros((BLOCK_M, TAIL), tl.float32)
    mask, mask_row = mask_ptr, 0
    if MASK != NO_MASK:
        mask += b * mask_stride_b + h * mask_stride_h
    if MASK == FULL_MASK:
        mask_row = tl.minimum(row, queries - 1).to(tl.int64)[:, None] * mask_stride_n
    limit = keys
    if lengths_ptr is not None:
        limit = tl.minimum(keys, tl.load(lengths_ptr + b))
    if not TMA:
        codes += group.to(tl.int64) * padded * WIDTH
        values += group.to(tl.int64) * padded * WIDTH

    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, limit, BLOCK_N, warp_specialize=SPECIALIZE):
        key = first + tl.arange(0, BLOCK_N)
        k0 = _codes(codes, group, first, key, 0, HEAD, WIDTH, TMA)
        s = tl.dot(q0, tl.trans(k0), out_dtype=tl.int32)
        if TAIL > 0:
            k1 = _codes(codes_tail if TMA else codes, group, first, key, HEAD, TAIL, WIDTH, TMA)
            s = tl.dot(q1, tl.trans(k1), s, out_dtype=tl.int32)
        step = tl.load(steps_ptr + group * blocks + first // BLOCK_N)
        unit = q_step * step
        unit = tl.where(unit == 0.0, 1e-37, unit)  # keys that do not exist have -inf: not times 0
        s = s.to(tl.float32)
        if not POSITIVE:
            s *= unit[:, None]
        if MASK != NO_MASK:
            s = masked(s, mask, mask_row, key, limit, mask_stride_m)
        if not EVEN:
            s = tl.where((key < limit)[None, :], s, float("-inf"))
        p, top, total, shrink = soften(s, top, total, unit, POSITIVE)
        if WEIGHTS == tl.float8e4nv:
            p *= E4M3_MAX
        p = operand(p, WEIGHTS)
        v0 = _values(values, group, first, key, 0, HEAD, padded, TMA)
        # a fresh sum per block: e4m3 products are added with fewer bits than float32 has
        acc0 = acc0 * shrink[:, None] + product(p, tl.trans(v0), None, "ieee")
        if TAIL > 0:
            v1 = _values(values_tail if TMA else values, group, first, key, HEAD, TAIL, padded, TMA)
            acc1 = acc1 * shrink[:, None] + product(p, tl.trans(v1), None, "ieee")

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    if WEIGHTS == tl.float8e4nv:
        inverse *= 1.0 / E4M3_MAX
    target = out_ptr + (b * queries * heads + h) * D
    some = (total != 0.0)[:, None]  # a query without keys gives 0, not the mean
    channel = v_scale_ptr + group * WIDTH, v_mean_ptr + group * WIDTH
    x = _scaled(acc0, inverse, some, channel[0], channel[1], HEAD)
    store_rows(target, heads * D, row, queries, x, D, 0, HEAD)
    if TAIL > 0:
        x = _scaled(acc1, inverse, some, channel[0] + HEAD, channel[1] + HEAD, TAIL)
        store_rows(target, heads * D, row, queries, x, D, HEAD, TAIL)
    if lse_ptr is not None:
        store_lse(lse_ptr + (b * heads + h) * queries, row, queries, top + added * scale, total)


@triton.jit
def _queries(q_row, exists, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)[None, :]
    return tl.load(q_row + d, mask=exists[:, None] & (d < D), other=0.0).to(tl.float32)


@triton.jit
def _codes(
    source, group, first, key, FIRST: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr
):
    """[BLOCK_N, COLUMNS] of the codes of k."""
    if TMA:
        x = source.load([group, first, FIRST]).reshape(key.shape[0], COLUMNS)
    else:
        x = tl.load(source + key.to(tl.int64)[:, None] * WIDTH + (FIRST + tl.arange(0, COLUMNS))[None, :])
    return x


@triton.jit
def _values(source, group, first, key, FIRST: tl.constexpr, COLUMNS: tl.constexpr, padded, TMA: tl.constexpr):
    """[COLUMNS, BLOCK_N] of the transposed values."""
    if TMA:
        x = source.load([group, FIRST, first]).reshape(COLUMNS, key.shape[0])
    else:
        x = tl.load(source + (FIRST + tl.arange(0, COLUMNS))[:, None] * padded + key.to(tl.int64)[None, :])
    return x


@triton.jit
def _scaled(acc, inverse, some, scale_ptr, mean_ptr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    x = acc * inverse[:, None] * tl.load(scale_ptr + d)[None, :]
    return x + tl.where(some, tl.load(mean_ptr + d)[None, :], 0.0)
