"""`gram` in Triton: contract in `fastdiff/ops/gram.py`. Two launches, no atomics: the same bits in every run.

The work split depends on the size of a sample only, so neither the batch nor the GPU changes a sum.
"""

import torch
import triton
import triton.language as tl

MAX_OPERANDS = 8
LANES = 4  # consecutive elements of one thread: 128 bits of float32
BLOCK = 1024  # elements read at once
CHUNK = 4 * BLOCK  # elements of one program
FINISH_BLOCK = 128
# without a limit ptxas aims at a rounder number of registers and spills 8 bytes on sm_100 (2 operands)
OPTIONS = {"num_warps": 8, "maxnreg": 248}
_PLAIN = ["chunks", "channel_size", *(f"v{i}_stride_c" for i in range(MAX_OPERANDS))]


@triton.jit(do_not_specialize=_PLAIN)
def gram_kernel(
    v0_ptr,
    v1_ptr,
    v2_ptr,
    v3_ptr,
    v4_ptr,
    v5_ptr,
    v6_ptr,
    v7_ptr,
    partial_ptr,
    n,
    chunks,
    channel_size,
    v0_stride_b,
    v0_stride_c,
    v0_stride_e,
    v1_stride_b,
    v1_stride_c,
    v1_stride_e,
    v2_stride_b,
    v2_stride_c,
    v2_stride_e,
    v3_stride_b,
    v3_stride_c,
    v3_stride_e,
    v4_stride_b,
    v4_stride_c,
    v4_stride_e,
    v5_stride_b,
    v5_stride_c,
    v5_stride_e,
    v6_stride_b,
    v6_stride_c,
    v6_stride_e,
    v7_stride_b,
    v7_stride_c,
    v7_stride_e,
    N: tl.constexpr,
    FLAT: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program sums one chunk of one sample: partial[b, k, chunk], k counting pairs i <= j, then sums."""
    program = tl.program_id(0)
    sample = program // chunks
    chunk = program - sample * chunks
    b = sample.to(tl.int64)
    bases = (v0_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr)
    strides_b = (
        v0_stride_b,
        v1_stride_b,
        v2_stride_b,
        v3_stride_b,
        v4_stride_b,
        v5_stride_b,
        v6_stride_b,
        v7_stride_b,
    )
    strides_c = (
        v0_stride_c,
        v1_stride_c,
        v2_stride_c,
        v3_stride_c,
        v4_stride_c,
        v5_stride_c,
        v6_stride_c,
        v7_stride_c,
    )
    strides_e = (
        v0_stride_e,
        v1_stride_e,
        v2_stride_e,
        v3_stride_e,
        v4_stride_e,
        v5_stride_e,
        v6_stride_e,
        v7_stride_e,
    )
    PAIRS: tl.constexpr = N * (N + 1) // 2
    totals = ()
    for _ in tl.static_range(PAIRS + N):
        totals = totals + (tl.zeros((BLOCK // LANES,), TYPE),)
    place = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for part in range(CHUNK // BLOCK):
        offsets = chunk * CHUNK + part * BLOCK + place
        inside = offsets < n
        values = ()
        for i in tl.static_range(N):
            base = bases[i] + b * strides_b[i]
            if FLAT:
                pointers = base + offsets
            else:
                channel, element = (offsets // channel_size).to(tl.int64), (offsets % channel_size).to(tl.int64)
                pointers = base + channel * strides_c[i] + element * strides_e[i]
            values = values + (tl.load(pointers, mask=inside, other=0.0).to(TYPE),)
        added = ()
        for i in tl.static_range(N):
            for j in tl.static_range(i, N):
                added = added + (totals[len(added)] + tl.sum(values[i] * values[j], axis=1),)
        for i in tl.static_range(N):
            added = added + (totals[PAIRS + i] + tl.sum(values[i], axis=1),)
        totals = added
    target = partial_ptr + b * (PAIRS + N) * chunks + chunk
    for k in tl.static_range(PAIRS + N):
        tl.store(target + k * chunks, tl.sum(totals[k].to(tl.float64), axis=0))


@triton.jit
def gram_finish_kernel(partial_ptr, out_ptr, chunks, N: tl.constexpr, BLOCK: tl.constexpr):
    """Program (b, i, j) sums the chunks of one entry in float64, in order."""
    PAIRS: tl.constexpr = N * (N + 1) // 2
    b, entry = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = entry // (N + 1), entry % (N + 1)
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    k = tl.where(j == N, PAIRS + i, low * N - low * (low - 1) // 2 + high - low)
    source = partial_ptr + (b * (PAIRS + N) + k) * chunks
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, chunks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(source + at, mask=at < chunks, other=0.0)
    tl.store(out_ptr + b * N * (N + 1) + entry, tl.sum(total, axis=0))


def chunks_of(n: int) -> int:
    """How many partial sums a sample of n elements has."""
    return max(triton.cdiv(n, CHUNK), 1)


def gram_triton(
    out: torch.Tensor, partial: torch.Tensor, operands: list, strides: list, n: int, channels: int
) -> None:
    """Fills out [B, N, N + 1]; partial [B, N (N + 1) / 2 + N, chunks_of(n)] float64 is scratch.

    strides  (batch, channel, element) of every operand
    """
    count, batch, chunks = len(operands), out.shape[0], partial.shape[2]
    spare = MAX_OPERANDS - count
    channel_size = max(n // max(channels, 1), 1)
    gram_kernel[(batch * chunks,)](
        *operands,
        *[None] * spare,
        *(partial, n, chunks, channel_size),
        *(step for triple in strides for step in triple),
        *[0] * (3 * spare),
        N=count,
        FLAT=all(e == 1 and (channels == 1 or c == channel_size) for _, c, e in strides),
        TYPE=tl.float64 if any(v.dtype == torch.float64 for v in operands) else tl.float32,
        BLOCK=BLOCK,
        LANES=LANES,
        CHUNK=CHUNK,
        **OPTIONS,
    )
    gram_finish_kernel[(batch, count * (count + 1))](partial, out, chunks, N=count, BLOCK=FINISH_BLOCK, num_warps=1)
