"""`linear_attention` in Triton: contract in `fastdiff/ops/linear_attention.py`.

Two launches: sums over the keys, then one product per query. Both take 3 products of TF32 for one of float32; 16-bit keys
meet 16-bit values in one product, which is exact.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast, product

PIECES = 4  # at most, of the keys, summed up side by side; their number depends on the keys only, not on the batch
KEYS, QUERIES = 32, 64  # at once: more of float32 spills


class Sizes(NamedTuple):
    """WIDTH: of a head, padded to a power of two; PART: of its columns that one program makes; warps."""

    width: int
    part: int
    warps: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": 2}


def sizes_of(head_dim: int) -> Sizes:
    width = max(triton.next_power_of_2(head_dim), 16)
    return Sizes(width, min(width, 32), 4)


@triton.jit(do_not_specialize=["keys", "heads", "piece"])
def linear_attention_sums_kernel(
    k_ptr,
    v_ptr,
    sums_ptr,
    totals_ptr,
    keys,
    heads,
    piece,
    k_stride_b,
    k_stride_m,
    k_stride_h,
    v_stride_b,
    v_stride_m,
    v_stride_h,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    KEYS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Program (sample, head, piece of the keys, part of the columns): relu(k)^T v [D, PART] and the sum of relu(k) [D]."""
    program = tl.program_id(0)
    part, group = program % (WIDTH // PART), program // (WIDTH // PART)
    b, h = (group // PIECES // heads).to(tl.int64), (group // PIECES % heads).to(tl.int64)
    first, last = group % PIECES * piece, tl.minimum(keys, (group % PIECES + 1) * piece)
    i, j = tl.arange(0, WIDTH), part * PART + tl.arange(0, PART)
    k_row, v_row = k_ptr + b * k_stride_b + h * k_stride_h, v_ptr + b * v_stride_b + h * v_stride_h
    sums, total = tl.zeros((WIDTH, PART), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        exists, at = (key < last)[:, None], key.to(tl.int64)[:, None]
        k = tl.load(k_row + at * k_stride_m + i[None, :], mask=exists & (i < D)[None, :], other=0.0)
        v = tl.load(v_row + at * v_stride_m + j[None, :], mask=exists & (j < D)[None, :], other=0.0)
        k = tl.where(k < 0, 0.0, k)  # NaN stays
        total += tl.sum(k.to(tl.float32), axis=0)
        sums = product(tl.trans(k.to(v.dtype)), v, sums, "tf32x3")
    at = group.to(tl.int64) * D + i
    tl.store(sums_ptr + at[:, None] * D + j[None, :], sums, mask=(i < D)[:, None] & (j < D)[None, :])
    if part == 0:
        tl.store(totals_ptr + at, total, mask=i < D)


@triton.jit(do_not_specialize=["queries", "heads", "tiles"])
def linear_attention_kernel(
    q_ptr,
    sums_ptr,
    totals_ptr,
    out_ptr,
    queries,
    heads,
    tiles,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    QUERIES: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Program (sample, head, tile of queries, part of the columns)."""
    program = tl.program_id(0)
    part, tile = program % (WIDTH // PART), program // (WIDTH // PART)
    group, row = tile // tiles, tile % tiles * QUERIES + tl.arange(0, QUERIES)
    b, h = (group // heads).to(tl.int64), (group % heads).to(tl.int64)
    exists, at = (row < queries)[:, None], row.to(tl.int64)[:, None]
    j = part * PART + tl.arange(0, PART)
    acc, weight = tl.zeros((QUERIES, PART), tl.float32), tl.zeros((QUERIES,), tl.float32)
    for first in tl.range(0, WIDTH, PART, num_stages=1):
        i = first + tl.arange(0, PART)
        source = q_ptr + b * q_stride_b + h * q_stride_h + at * q_stride_n + i[None, :]
        q = tl.load(source, mask=exists & (i < D)[None, :], other=0.0).to(tl.float32)
        q = tl.where(q < 0, 0.0, q)
        sums, total = tl.zeros((PART, PART), tl.float32), tl.zeros((PART,), tl.float32)
        for piece in tl.static_range(PIECES):
            place = (group.to(tl.int64) * PIECES + piece) * D + i
            inside = (i < D)[:, None] & (j < D)[None, :]
            sums += tl.load(sums_ptr + place[:, None] * D + j[None, :], mask=inside, other=0.0)
            total += tl.load(totals_ptr + place, mask=i < D, other=0.0)
        acc = product(q, sums, acc, "tf32x3")
        weight += tl.sum(q * total[None, :], axis=1)
    out = cast(acc / (weight + eps)[:, None], out_ptr.dtype.element_ty)
    target = out_ptr + ((b * queries + at) * heads + h) * D + j[None, :]
    tl.store(target, out, mask=exists & (j < D)[None, :])


def linear_attention_triton(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    """Fills contiguous out [B, N, H, D]."""
    (B, N, H, D), M = q.shape, k.shape[1]
    if out.numel() == 0:
        return
    sizes = sizes_of(D)
    parts, tiles = sizes.width // sizes.part, triton.cdiv(N, QUERIES)
    pieces = min(max(triton.cdiv(M, KEYS), 1), PIECES)
    sums = torch.empty(B * H * pieces, D, D, dtype=torch.float32, device=q.device)
    totals = torch.empty(B * H * pieces, D, dtype=torch.float32, device=q.device)
    piece = triton.cdiv(triton.cdiv(M, pieces), KEYS) * KEYS
    constants = {"D": D, "WIDTH": sizes.width, "PART": sizes.part, "PIECES": pieces}
    linear_attention_sums_kernel[(B * H * pieces * parts,)](
        *(k, v, sums, totals, M, H, piece, *k.stride()[:3], *v.stride()[:3]), **constants, KEYS=KEYS, **sizes.options
    )
    linear_attention_kernel[(B * H * tiles * parts,)](
        *(q, sums, totals, out, N, H, tiles, *q.stride()[:3], eps), **constants, QUERIES=QUERIES, **sizes.options
    )
