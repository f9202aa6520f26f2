"""`solver_step` in Triton: contract and meaning of every argument in `fastdiff/ops/solver_step.py`."""

import triton
import triton.language as tl

from fastdiff.kernels.philox import normal_block
from fastdiff.kernels.rounding import cast

# columns of coef in the order of the contract; tests/test_triton.py compares them
a, b0, b1, b2, b3, d, lo, hi = (tl.constexpr(k) for k in range(8))
A, B, R, S0, S1, S2, S3, S4, C0, C1, D, E, c_in = (tl.constexpr(k) for k in range(8, 21))
META = tl.constexpr(6)

# tick holds the line of `rows` in its low bits and, while the kernel runs, the number of finished programs above them:
# the last program writes line + 1. No second buffer, so nothing can be shared between streams or lost between replays
LINES = tl.constexpr(1 << 17)
_MAX_PROGRAMS = (1 << 14) - 1
MAX_OUTPUTS = 4
BLOCK, SMALL_BLOCK = 1024, 128  # elements of one program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # contraction would change the bits
# sizes that no vector width depends on: not worth a compilation each
_PLAIN = ["batch", "channel_size", "copies", "blocks", "items", "coef_channels", "coef_elements"]
_PLAIN += [*(f"m{j}_stride_c" for j in range(4)), "coef_stride_r", "coef_stride_k", "coef_stride_c"]


@triton.jit(do_not_specialize=_PLAIN)
def solver_step_kernel(
    x_ptr,
    history_ptr,
    input_ptr,
    tick_ptr,
    m0_ptr,
    m1_ptr,
    m2_ptr,
    m3_ptr,
    source_ptr,
    aux_ptr,
    coef_ptr,
    meta_ptr,
    rows_ptr,
    seed_ptr,
    batch,
    channel_size,
    n,
    copies,
    blocks,
    items,
    m0_stride_b,
    m0_stride_c,
    m0_stride_e,
    m1_stride_b,
    m1_stride_c,
    m1_stride_e,
    m2_stride_b,
    m2_stride_c,
    m2_stride_e,
    m3_stride_b,
    m3_stride_c,
    m3_stride_e,
    coef_stride_r,
    coef_stride_k,
    coef_stride_c,
    coef_stride_e,
    coef_channels,
    coef_elements,
    OUTPUTS: tl.constexpr,
    SLOTS: tl.constexpr,
    FLAT: tl.constexpr,
    FIELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs stride over items = batch * blocks. FLAT: each output's sample is contiguous. FIELD: coef has 4 dims."""
    tick = tl.load(tick_ptr)
    line = (tick & (LINES - 1)).to(tl.int64)
    outputs = (m0_ptr, m1_ptr, m2_ptr, m3_ptr)
    strides_b = (m0_stride_b, m1_stride_b, m2_stride_b, m3_stride_b)
    strides_c = (m0_stride_c, m1_stride_c, m2_stride_c, m3_stride_c)
    strides_e = (m0_stride_e, m1_stride_e, m2_stride_e, m3_stride_e)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        sample = item // blocks
        first = (item - sample * blocks) * BLOCK  # int32 inside a sample, int64 from sample to sample
        b = sample.to(tl.int64)
        offsets = first + tl.arange(0, BLOCK)
        inside = offsets < n
        x_row = x_ptr + b * n
        # always allocated, nearly always needed, and its address waits for nothing: it hides the latency of the table
        x = tl.load(x_row + offsets, mask=inside, other=0.0)
        row = tl.load(rows_ptr + line * batch + b).to(tl.int64)
        if row >= 0:
            channel, element = (offsets // channel_size).to(tl.int64), (offsets % channel_size).to(tl.int64)
            # one coefficient: a scalar, or with FIELD a block
            table = coef_ptr + row * coef_stride_r
            if FIELD:
                table = table + channel * coef_stride_c + element * coef_stride_e
            meta = meta_ptr + row * META

            raw = _add(tl.zeros_like(x), _coef(table, a, coef_stride_k, inside, FIELD), x)
            for j in tl.static_range(OUTPUTS):
                k = _coef(table, b0 + j, coef_stride_k, inside, FIELD)
                origin = b
                if source_ptr is not None:
                    origin = tl.load(source_ptr + b + batch * j).to(tl.int64)
                m = outputs[j] + origin * strides_b[j]
                if FLAT:
                    v = _read(m + offsets, inside, k, x.dtype)
                else:
                    v = _read(m + channel * strides_c[j] + element * strides_e[j], inside, k, x.dtype)
                raw = _add(raw, k, v)
            if aux_ptr is not None:
                k = _coef(table, d, coef_stride_k, inside, FIELD)
                raw = _add(raw, k, _read(aux_ptr + b * n + offsets, inside, k, x.dtype))
            low = _coef(table, lo, coef_stride_k, inside, FIELD)
            high = _coef(table, hi, coef_stride_k, inside, FIELD)
            h = tl.where(raw < low, low, raw)  # a comparison with NaN is false, so NaN stays
            h = tl.where(h > high, high, h)

            new_x = _add(tl.zeros_like(x), _coef(table, A, coef_stride_k, inside, FIELD), x)
            new_x = _add(new_x, _coef(table, B, coef_stride_k, inside, FIELD), h)
            new_x = _add(new_x, _coef(table, R, coef_stride_k, inside, FIELD), raw)
            for s in tl.static_range(SLOTS):
                k = _coef(table, S0 + s, coef_stride_k, inside, FIELD)
                slot = history_ptr + (b + s * tl.cast(batch, tl.int64)) * n
                new_x = _add(new_x, k, _read(slot + offsets, inside, k, x.dtype))
            for i in tl.static_range(2):
                k = _coef(table, C0 + i, coef_stride_k, inside, FIELD)
                if _any(k, FIELD):
                    step, stream = tl.load(meta + 2 + 2 * i), tl.load(meta + 3 + 2 * i)
                    z = normal_block(tl.load(seed_ptr + b), step, stream, first, BLOCK)
                    new_x = _add(new_x, k, z.to(x.dtype))
            if aux_ptr is not None:
                k = _coef(table, D, coef_stride_k, inside, FIELD)
                new_x = _add(new_x, k, _read(aux_ptr + b * n + offsets, inside, k, x.dtype))
            k = _coef(table, E, coef_stride_k, inside, FIELD)
            new_x = _add(new_x, k, tl.full(x.shape, 1.0, x.dtype))

            slot_h, slot_x = tl.load(meta), tl.load(meta + 1)
            slot = history_ptr + (slot_x.to(tl.int64) * batch + b) * n
            tl.store(slot + offsets, x, mask=inside & (slot_x >= 0))
            slot = history_ptr + (slot_h.to(tl.int64) * batch + b) * n
            tl.store(slot + offsets, h, mask=inside & (slot_h >= 0))
            tl.store(x_row + offsets, new_x, mask=inside)
            entry = coef_ptr + row * coef_stride_r + c_in * coef_stride_k
            if _nonzero(entry, coef_channels, coef_elements, coef_stride_c, coef_stride_e, FIELD):
                scaled = new_x * _coef(table, c_in, coef_stride_k, inside, FIELD)
                if input_ptr.dtype.element_ty.primitive_bitwidth < 32:
                    scaled = scaled.to(tl.float32)  # float64 rounds twice on its way to 16 bits, as in torch
                for copy in range(copies):
                    target = input_ptr + (b + copy * tl.cast(batch, tl.int64)) * n
                    tl.store(target + offsets, cast(scaled, input_ptr.dtype.element_ty), mask=inside)
    _advance(tick_ptr)


@triton.jit
def _coef(table, COLUMN: tl.constexpr, stride_k, inside, FIELD: tl.constexpr):
    if FIELD:
        k = tl.load(table + COLUMN * stride_k, mask=inside, other=0.0)
    else:
        k = tl.load(table + COLUMN * stride_k)
    return k


@triton.jit
def _read(pointers, inside, k, dtype: tl.constexpr):
    """An operand where its coefficient is not zero; elsewhere it is not read."""
    # not `inside & (k != 0.0)`: the interpreter of Triton 3.6 makes floats of a scalar comparison that meets a block
    return tl.load(pointers, mask=tl.where(k != 0.0, inside, False), other=0.0).to(dtype)


@triton.jit
def _add(total, k, v):
    """total + k v; a zero coefficient adds nothing, whatever v is."""
    return tl.where(k != 0.0, total + k * v, total)


@triton.jit
def _any(k, FIELD: tl.constexpr):
    if FIELD:
        found = tl.max((k != 0.0).to(tl.int32), axis=0) != 0
    else:
        found = k != 0.0
    return found


@triton.jit
def _nonzero(entry, channels, elements, stride_c, stride_e, FIELD: tl.constexpr):
    """Whether a coefficient is not zero somewhere in the whole sample; stops at the first block that has one."""
    if FIELD:
        found, first = 0, 0
        while (found == 0) & (first < channels * elements):
            at = first + tl.arange(0, 256)
            place = (at // elements).to(tl.int64) * stride_c + (at % elements).to(tl.int64) * stride_e
            k = tl.load(entry + place, mask=at < channels * elements, other=0.0)
            found = tl.max((k != 0.0).to(tl.int32), axis=0)
            first += 256
        answer = found != 0
    else:
        answer = tl.load(entry) != 0.0
    return answer


@triton.jit
def _advance(tick_ptr):
    """Counts this program as finished; the last one writes the next line."""
    tl.debug_barrier()  # every thread has read the line
    before = tl.atomic_add(tick_ptr, LINES, sem="acq_rel")
    if (before // LINES) == tl.num_programs(0) - 1:
        tl.store(tick_ptr, (before & (LINES - 1)) + 1)


def solver_step_triton(x, history, model_input, tick, outputs, strides, source, aux, coef, meta, rows, seed) -> None:
    """Runs one step in place: one launch, no allocation. `strides` has (batch, channel, element) of every output."""
    batch = x.shape[0]
    channels = x.shape[1] if x.dim() > 1 else 1
    n = x.numel() // max(batch, 1)
    channel_size = max(n // max(channels, 1), 1)
    block = BLOCK if n >= BLOCK else SMALL_BLOCK
    blocks = triton.cdiv(n, block)
    items = batch * blocks
    rounds = max(triton.cdiv(items, _MAX_PROGRAMS), 1)
    field = coef.dim() == 4
    spare = MAX_OUTPUTS - len(outputs)
    solver_step_kernel[(max(triton.cdiv(items, rounds), 1),)](
        *(x, history, model_input, tick, *outputs, *[None] * spare, source, aux, coef, meta, rows, seed),
        *(batch, channel_size, n, model_input.shape[0], blocks, items),
        *(step for triple in strides for step in triple),
        *[0] * (3 * spare),
        *coef.stride()[:2],
        *([coef.stride(i) if coef.shape[i] > 1 else 0 for i in (2, 3)] if field else (0, 0)),
        *(coef.shape[2:] if field else (1, 1)),
        OUTPUTS=len(outputs),
        SLOTS=history.shape[0],
        FLAT=all(e == 1 and (channels == 1 or c == channel_size) for _, c, e in strides),
        FIELD=field,
        BLOCK=block,
        **OPTIONS,
    )
