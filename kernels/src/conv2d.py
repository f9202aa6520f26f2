"""`conv2d` and `conv2d_w8a8` in Triton: contracts in `fastdiff/ops/conv2d.py` and `fastdiff/ops/conv2d_w8a8.py`.

An implicit product [pixels, taps * channels] x [taps * channels, outputs]: no image of patches is ever written. Weights are in
rows, as `packing.pack_conv` makes them: per segment [tap][channel padded to 16 bytes].
"""

import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast, int8_codes, product

_FINISH_PLAIN = ["pixels", "share", "columns", "splits", "x_scale_stride", "x2_scale_stride"]
_PLAIN = ["batch", "height", "width", "out_height", "out_width", "left", "top", *_FINISH_PLAIN]


@triton.jit(do_not_specialize=_PLAIN)
def conv2d_kernel(
    x,
    weight,
    x2,
    weight2,
    x_scale_ptr,
    x2_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    emb_ptr,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    partial_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    pixels,
    share,
    channels,
    channels2,
    padded,
    padded2,
    row,
    n,
    left,
    top,
    columns,
    splits,
    emb_stride,
    x_scale_stride,
    x2_scale_stride,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Program (tile of IMAGES x ROWS x COLUMNS pixels, tile of BLOCK_N of the n outputs; one of `splits` parts of the sum).

    TMA: x is a descriptor of [batch, height, width, channels], and weight of [outputs, taps, channels], and what is outside
    of an image is 0 by itself; else they are pointers, rows of weight `row` elements apart, and a tile is COLUMNS pixels of
    whatever samples. `pixels` of all samples come out, `share` of each. x2 and weight2, likewise, are the second segment, or None.
    DTYPE: of the operands; int8 sums are exact, and of each segment by itself. partial_ptr: sums go there, for
    conv2d_finish_kernel, as [segments where int8, splits, pixels, n]. PARTS: of the columns, finished one after another.
    """
    BLOCK_M: tl.constexpr = IMAGES * ROWS * COLUMNS
    program, split = tl.program_id(0), tl.program_id(1)
    tile, first_n = program // columns, program % columns * BLOCK_N
    m, column = tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if TMA:
        tiles_x, tiles_y = tl.cdiv(out_width, COLUMNS), tl.cdiv(out_height, ROWS)
        b0, y0, x0 = tile // tiles_x // tiles_y * IMAGES, tile // tiles_x % tiles_y * ROWS, tile % tiles_x * COLUMNS
        b, y, at = b0 + m // (ROWS * COLUMNS), y0 + m // COLUMNS % ROWS, x0 + m % COLUMNS
        exists = (b < batch) & (y < out_height) & (at < out_width)
        pixel = (b * out_height + y) * out_width + at
    else:
        b0, y0, x0 = 0, 0, 0
        pixel = tile * COLUMNS + m
        exists = pixel < pixels
        b, y, at = pixel // share, pixel % share // out_width * STRIDE, pixel % out_width * STRIDE
    sample, y0, x0, y, at = pixel // share, y0 - top, x0 - left, y - top, at - left

    total: tl.constexpr = tl.int32 if DTYPE == tl.int8 else tl.float32
    zeros = tl.zeros((BLOCK_M, BLOCK_N), total)
    # fmt: off
    acc = _segment(
        zeros, x, weight, channels, padded, row, n, b, y, at, exists, first_n, b0, y0, x0, height, width, split, splits,
        KERNEL, UPSAMPLE, BLOCK_K, DTYPE, PRECISION, TMA,
    )
    # fmt: on
    first = acc
    if x2 is not None:
        if DTYPE == tl.int8:
            if partial_ptr is None:
                first = scaled(acc, x_scale_ptr, x_scale_stride, weight_scale_ptr, sample, exists, column, n)
            else:
                keep(partial_ptr, acc, split, pixel, exists, column, pixels, n)
            acc = zeros
        # fmt: off
        acc = _segment(
            acc, x2, weight2, channels2, padded2, row, n, b, y, at, exists, first_n, b0, y0, x0, height, width, split,
            splits, KERNEL, UPSAMPLE, BLOCK_K, DTYPE, PRECISION, TMA,
        )
        # fmt: on
    if partial_ptr is not None:
        slot = split
        if x2 is not None and DTYPE == tl.int8:
            slot += splits
        keep(partial_ptr, acc, slot, pixel, exists, column, pixels, n)
    elif x2 is not None and DTYPE == tl.int8:
        out = first + scaled(acc, x2_scale_ptr, x2_scale_stride, weight_scale_ptr, sample, exists, column, n)
        # fmt: off
        _finish_in_parts(
            out, None, bias_ptr, emb_ptr, emb_stride, residual_ptr, out_scale_ptr, out_ptr, pixel, sample, exists,
            first_n, n, PARTS,
        )
        # fmt: on
    else:
        if DTYPE == tl.int8:  # times the scale of the outputs in the parts, where it takes fewer registers
            out = scaled(acc, x_scale_ptr, x_scale_stride, None, sample, exists, column, n)
        else:
            out = acc
        # fmt: off
        _finish_in_parts(
            out, weight_scale_ptr, bias_ptr, emb_ptr, emb_stride, residual_ptr, out_scale_ptr, out_ptr, pixel, sample,
            exists, first_n, n, PARTS,
        )
        # fmt: on


@triton.jit
def _finish_in_parts(
    y,
    weight_scale_ptr,
    bias_ptr,
    emb_ptr,
    emb_stride,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    pixel,
    sample,
    exists,
    first,
    n,
    PARTS: tl.constexpr,
):
    """`finish` on PARTS (1, 2 or 4) ranges of columns one after another, which needs fewer registers."""
    width: tl.constexpr = y.shape[1]
    if PARTS == 1:
        # fmt: off
        finish(
            y, weight_scale_ptr, bias_ptr, emb_ptr, emb_stride, residual_ptr, out_scale_ptr, out_ptr, pixel, sample,
            exists, first + tl.arange(0, width), n,
        )
        # fmt: on
    else:
        left, right = tl.split(y.reshape(y.shape[0], 2, width // 2).permute(0, 2, 1))
        # fmt: off
        _finish_in_parts(
            left, weight_scale_ptr, bias_ptr, emb_ptr, emb_stride, residual_ptr, out_scale_ptr, out_ptr, pixel, sample,
            exists, first, n, PARTS // 2,
        )
        _finish_in_parts(
            right, weight_scale_ptr, bias_ptr, emb_ptr, emb_stride, residual_ptr, out_scale_ptr, out_ptr, pixel, sample,
            exists, first + width // 2, n, PARTS // 2,
        )
        # fmt: on


@triton.jit
def _segment(
    acc,
    x,
    weight,
    channels,
    padded,
    row,
    n,
    b,
    y,
    at,
    exists,
    first_n,
    b0,
    y0,
    x0,
    height,
    width,
    split,
    splits,
    KERNEL: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """acc plus this part of a segment's products. b, y, at: sample and first row and column that each pixel sees; b0,
    y0, x0: those of the tile."""
    blocks = tl.cdiv(channels, BLOCK_K)
    steps = KERNEL * KERNEL * blocks
    column = first_n + tl.arange(0, acc.shape[1])
    if not TMA:
        weight += column.to(tl.int64)[:, None] * row
    for step in tl.range(steps * split // splits, steps * (split + 1) // splits):
        tap, c = step // blocks, step % blocks * BLOCK_K
        dy, dx = tap // KERNEL, tap % KERNEL
        if TMA:
            a = x.load([b0, y0 + dy, x0 + dx, c]).reshape(acc.shape[0], BLOCK_K)
            w = weight.load([first_n, tap, c]).reshape(acc.shape[1], BLOCK_K)
        else:
            k = c + tl.arange(0, BLOCK_K)[None, :]
            inside = exists & (y + dy >= 0) & (y + dy < height * UPSAMPLE)
            inside = inside & (at + dx >= 0) & (at + dx < width * UPSAMPLE)
            seen = (b * height + (y + dy) // UPSAMPLE) * width + (at + dx) // UPSAMPLE
            place = x + seen.to(tl.int64)[:, None] * channels + k
            a = tl.load(place, mask=inside[:, None] & (k < channels), other=0)
            w = tl.load(weight + tap * padded + k, mask=(column < n)[:, None] & (k < padded), other=0)
        if a.dtype != DTYPE:
            a = cast(a.to(tl.float32), DTYPE)
        if DTYPE == tl.int8:
            acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
        else:
            acc = product(a, tl.trans(w), acc, PRECISION)
    return acc


@triton.jit
def scaled(acc, scale_ptr, stride, weight_scale_ptr, sample, exists, column, n):
    """Integer sums times the scale of each pixel's sample and that of each output."""
    scale = tl.load(scale_ptr + sample * stride, mask=exists, other=0.0)
    y = acc.to(tl.float32) * scale[:, None]
    if weight_scale_ptr is not None:
        y *= tl.load(weight_scale_ptr + column, mask=column < n, other=0.0)[None, :]
    return y


@triton.jit
def keep(partial_ptr, acc, slot, pixel, exists, column, pixels, n):
    """Stores unfinished sums as number `slot`."""
    place = partial_ptr + (slot.to(tl.int64) * pixels + pixel)[:, None] * n + column[None, :]
    tl.store(place, acc, mask=exists[:, None] & (column < n)[None, :])


@triton.jit
def finish(
    y,
    weight_scale_ptr,
    bias_ptr,
    emb_ptr,
    emb_stride,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    pixel,
    sample,
    exists,
    column,
    n,
):
    """What follows the sums, in float32; stores the result."""
    used = column < n
    inside = exists[:, None] & used[None, :]
    place = pixel.to(tl.int64)[:, None] * n + column[None, :]
    if weight_scale_ptr is not None:
        y *= tl.load(weight_scale_ptr + column, mask=used, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=used, other=0.0)[None, :]
    if emb_ptr is not None:
        y += tl.load(emb_ptr + sample.to(tl.int64)[:, None] * emb_stride + column[None, :], mask=inside, other=0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if out_scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(out_scale_ptr))
        tl.store(out_ptr + place, int8_codes(y, inverse), mask=inside)
    else:
        tl.store(out_ptr + place, cast(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_FINISH_PLAIN)
def conv2d_finish_kernel(
    partial_ptr,
    x_scale_ptr,
    x2_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    emb_ptr,
    residual_ptr,
    out_scale_ptr,
    out_ptr,
    pixels,
    share,
    n,
    columns,
    splits,
    emb_stride,
    x_scale_stride,
    x2_scale_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (tile of pixels, tile of outputs): adds up what conv2d_kernel split, always in the same order, and finishes."""
    program = tl.program_id(0)
    pixel = program // columns * ROWS + tl.arange(0, ROWS)
    column = program % columns * COLUMNS + tl.arange(0, COLUMNS)
    exists, sample = pixel < pixels, pixel // share
    y = _sum(partial_ptr, 0, splits, pixel, exists, column, pixels, n)
    if x_scale_ptr is None:
        y = y.to(tl.float32)
    else:
        y = scaled(y, x_scale_ptr, x_scale_stride, weight_scale_ptr, sample, exists, column, n)
    if x2_scale_ptr is not None:
        second = _sum(partial_ptr, splits, splits, pixel, exists, column, pixels, n)
        y += scaled(second, x2_scale_ptr, x2_scale_stride, weight_scale_ptr, sample, exists, column, n)
    # fmt: off
    finish(
        y, None, bias_ptr, emb_ptr, emb_stride, residual_ptr, out_scale_ptr, out_ptr, pixel, sample, exists,
        column, n,
    )
    # fmt: on


@triton.jit
def _sum(partial_ptr, first, count, pixel, exists, column, pixels, n):
    """The sum of numbers first .. first + count - 1 of what `keep` stored; of 16 bits in float32."""
    inside = exists[:, None] & (column < n)[None, :]
    step = pixels.to(tl.int64) * n
    place = partial_ptr + first * step + pixel.to(tl.int64)[:, None] * n + column[None, :]
    total: tl.constexpr = tl.int32 if partial_ptr.dtype.element_ty == tl.int32 else tl.float32
    y = tl.load(place, mask=inside, other=0).to(total)
    for slot in range(1, count):
        y += tl.load(place + slot * step, mask=inside, other=0)
    return y
