"""`group_norm` and `group_norm_nchw` in Triton: one family for both layouts, which differ in strides and tiles only.

Large images take three launches: statistics of pieces, merging them per group, applying. Small ones take one, with a
program per group. No atomics and a fixed order, so the same bits in every run and for every batch.
"""

import math

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast, int8_codes

SMALL_TILE = 16_384  # pixels times channels of a group, each rounded up to a power of two, that stay in registers
MIN_PIECE, MAX_PIECE, PIECES = (
    16_384,
    262_144,
    2048,
)  # elements of a piece; about how many of them a sample has at most
TILE = 4096  # elements read at once by the statistics
APPLIED_TILE, APPLIED_TILES = 2048, 4  # elements written at once, and how often per program
STATS_OPTIONS, APPLY_OPTIONS, FINALIZE_OPTIONS = {"num_warps": 8}, {"num_warps": 4}, {"num_warps": 4}
FINALIZE_BLOCK = 1024


@triton.jit
def _read(x_ptr, x2_ptr, start, start2, pixel, c, inside, C1, x_pixel, x_channel, x2_pixel):
    """Elements of pixels [P, 1] and channels [1, C] as float32; channels from C1 on are x2's, rounded like x's."""
    c = c.to(tl.int64)
    x = tl.load(x_ptr + start + pixel * x_pixel + c * x_channel, mask=inside & (c < C1), other=0.0).to(tl.float32)
    if x2_ptr is not None:
        place = x2_ptr + start2 + pixel * x2_pixel + (c - C1)
        more = tl.load(place, mask=inside & (c >= C1), other=0.0).to(tl.float32)
        x = tl.where(c < C1, x, cast(more, x_ptr.dtype.element_ty).to(tl.float32))
    return x


@triton.jit(do_not_specialize=["pieces", "columns"])
def group_norm_stats_kernel(
    x_ptr,
    x2_ptr,
    partial_ptr,
    pixels,
    C1,
    C,
    x_pixel,
    x_channel,
    x2_pixel,
    piece,
    pieces,
    columns,
    plane,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Program (sample, piece of pixels, column of channels): means and squared deviations, partial[2, sample, piece, C].

    Each place of the tile keeps its own (Welford 1962), relative to the first pixel: no digits cancel.
    """
    program = tl.program_id(0)
    column, rest = program % columns, program // columns
    b, first = (rest // pieces).to(tl.int64), (rest % pieces) * piece
    c = column * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    lane = tl.arange(0, PIXELS)[:, None]
    start, start2 = b * pixels * C1, b * pixels * (C - C1)
    here = tl.zeros((1, 1), tl.int64) + first
    base = _read(x_ptr, x2_ptr, start, start2, here, c, c < C, C1, x_pixel, x_channel, x2_pixel)
    mean, square = tl.zeros((PIXELS, CHANNELS), tl.float32), tl.zeros((PIXELS, CHANNELS), tl.float32)
    last = tl.minimum(first + piece, pixels)
    whole = (last - first) // PIXELS
    for k in tl.range(0, whole, loop_unroll_factor=2):  # more loads in flight
        pixel = (first + k * PIXELS + lane).to(tl.int64)
        x = _read(x_ptr, x2_ptr, start, start2, pixel, c, c < C, C1, x_pixel, x_channel, x2_pixel)
        change = x - base - mean
        mean += change * (1.0 / (k + 1.0))
        square += change * (x - base - mean)
    pixel = (first + whole * PIXELS + lane).to(tl.int64)
    inside = pixel < last
    x = _read(x_ptr, x2_ptr, start, start2, pixel, c, inside & (c < C), C1, x_pixel, x_channel, x2_pixel)
    change = tl.where(inside, x - base - mean, 0.0)
    mean += change * (1.0 / (whole + 1.0))
    square += tl.where(inside, change * (x - base - mean), 0.0)

    count = whole.to(tl.float32) + inside.to(tl.float32)
    center = tl.sum(mean * count, axis=0)[None, :] / (last - first)
    square += count * (mean - center) * (mean - center)
    target = partial_ptr + rest.to(tl.int64) * C + c
    tl.store(target, base + center, mask=c < C)
    tl.store(target + plane, tl.sum(square, axis=0)[None, :], mask=c < C)


@triton.jit(do_not_specialize=["pieces"])
def group_norm_finalize_kernel(
    partial_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    applied_ptr,
    pixels,
    groups,
    C,
    piece,
    pieces,
    plane,
    samples,
    eps,
    scale_stride_b,
    shift_stride_b,
    BLOCK: tl.constexpr,
):
    """Program (sample, group) merges its pieces (Chan et al. 1979): applied[3, sample, C] holds mean, factor, summand."""
    program = tl.program_id(0)
    b, group = (program // groups).to(tl.int64), program % groups
    width = C // groups
    count = pieces * width
    source = partial_ptr + b * pieces * C + group * width
    base = tl.load(source)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        n = tl.minimum(piece, pixels - (i // width) * piece)
        mean = tl.load(source + (i // width).to(tl.int64) * C + i % width, mask=i < count, other=0.0)
        total += tl.where(i < count, n * (mean - base), 0.0)
    elements = tl.cast(pixels, tl.float32) * width
    center = base + tl.sum(total, axis=0) / elements
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        n = tl.minimum(piece, pixels - (i // width) * piece)
        place = source + (i // width).to(tl.int64) * C + i % width
        away = tl.load(place, mask=i < count, other=0.0) - center
        square = tl.load(place + plane, mask=i < count, other=0.0)
        total += tl.where(i < count, square + n * away * away, 0.0)
    inverse = tl.rsqrt(tl.sum(total, axis=0) / elements + eps)
    for first in range(0, width, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        c, used = group * width + lane, lane < width
        factor, summand = _affine(
            *(inverse, weight_ptr, bias_ptr, scale_ptr, shift_ptr, b * scale_stride_b, b * shift_stride_b, c, used)
        )
        target = applied_ptr + b * C + c
        stride = tl.cast(samples, tl.int64) * C
        tl.store(target, tl.zeros_like(factor) + center, mask=used)
        tl.store(target + stride, factor, mask=used)
        tl.store(target + 2 * stride, summand, mask=used)


@triton.jit
def _affine(inverse, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_at, shift_at, c, used):
    """(factor, summand) with ((x - mean) * inverse * weight + bias) * (1 + scale) + shift = (x - mean) factor + summand."""
    factor, summand = tl.zeros(c.shape, tl.float32) + inverse, tl.zeros(c.shape, tl.float32)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + c, mask=used, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        summand += tl.load(bias_ptr + c, mask=used, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        more = 1.0 + tl.load(scale_ptr + scale_at + c, mask=used, other=0.0).to(tl.float32)
        factor, summand = factor * more, summand * more
    if shift_ptr is not None:
        summand += tl.load(shift_ptr + shift_at + c, mask=used, other=0.0).to(tl.float32)
    return factor, summand


@triton.jit
def _write(target, y, out_scale_ptr, inside, SILU: tl.constexpr):
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    if out_scale_ptr is None:
        tl.store(target, cast(y, target.dtype.element_ty), mask=inside)
    else:
        inverse = tl.div_rn(1.0, tl.load(out_scale_ptr))
        tl.store(target, int8_codes(y, inverse), mask=inside)


@triton.jit(do_not_specialize=["tiles", "columns", "samples"])
def group_norm_apply_kernel(
    x_ptr,
    x2_ptr,
    applied_ptr,
    out_ptr,
    out_scale_ptr,
    pixels,
    C1,
    C,
    x_pixel,
    x_channel,
    x2_pixel,
    out_pixel,
    tiles,
    columns,
    samples,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Program (sample, TILES tiles of pixels, column of channels)."""
    program = tl.program_id(0)
    column, rest = program % columns, program // columns
    b, first = (rest // tiles).to(tl.int64), (rest % tiles) * TILES * PIXELS
    c = column * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    source = applied_ptr + b * C + c
    stride = tl.cast(samples, tl.int64) * C
    mean = tl.load(source, mask=c < C, other=0.0)
    factor = tl.load(source + stride, mask=c < C, other=0.0)
    summand = tl.load(source + 2 * stride, mask=c < C, other=0.0)
    start, start2 = b * pixels * C1, b * pixels * (C - C1)
    for k in tl.static_range(TILES):
        pixel = (first + k * PIXELS + tl.arange(0, PIXELS)[:, None]).to(tl.int64)
        inside = (pixel < pixels) & (c < C)
        x = _read(x_ptr, x2_ptr, start, start2, pixel, c, inside, C1, x_pixel, x_channel, x2_pixel)
        target = out_ptr + b * pixels * C + pixel * out_pixel + c.to(tl.int64) * x_channel
        _write(target, (x - mean) * factor + summand, out_scale_ptr, inside, SILU)


@triton.jit
def group_norm_small_kernel(
    x_ptr,
    x2_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    out_scale_ptr,
    pixels,
    groups,
    C1,
    C,
    x_pixel,
    x_channel,
    x2_pixel,
    out_pixel,
    eps,
    scale_stride_b,
    shift_stride_b,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (sample, group): the group stays in registers. ALIGNED divides its number of channels: loads are as wide."""
    program = tl.program_id(0)
    b, group = (program // groups).to(tl.int64), program % groups
    width = tl.multiple_of(C // groups, ALIGNED)
    lane = tl.arange(0, CHANNELS)[None, :]
    c, pixel = tl.multiple_of(group * width, ALIGNED) + lane, tl.arange(0, PIXELS)[:, None]
    inside = (lane < width) & (pixel < pixels)
    start, start2 = b * pixels * C1, b * pixels * (C - C1)
    x = _read(x_ptr, x2_ptr, start, start2, pixel, c, inside, C1, x_pixel, x_channel, x2_pixel)
    count = tl.cast(pixels, tl.float32) * width
    # about one of the values, so that a large mean costs no digits
    zero = tl.zeros((1, 1), tl.int32)
    x -= _read(x_ptr, x2_ptr, start, start2, zero, zero + group * width, zero == 0, C1, x_pixel, x_channel, x2_pixel)
    x = tl.where(inside, x - tl.sum(tl.sum(tl.where(inside, x, 0.0), axis=1), axis=0) / count, 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / count + eps)
    factor, summand = _affine(
        *(inverse, weight_ptr, bias_ptr, scale_ptr, shift_ptr, b * scale_stride_b, b * shift_stride_b, c, lane < width)
    )
    target = out_ptr + b * pixels * C + pixel * out_pixel + c.to(tl.int64) * x_channel
    _write(target, x * factor + summand, out_scale_ptr, inside, SILU)


def tile_of(elements: int, pixels: int, channels: int, nhwc: bool) -> tuple[int, int]:
    """PIXELS and CHANNELS of a tile, the contiguous dimension as wide as it is useful."""
    if nhwc:
        width = 128 if channels % 128 == 0 else min(max(triton.next_power_of_2(channels), 8), 64)
        return elements // width, width
    length = min(triton.next_power_of_2(pixels), elements)
    return length, elements // length


def small_tile(pixels: int, width: int) -> tuple[int, int] | None:
    """PIXELS and CHANNELS that hold a group of `width` channels in registers, or None."""
    tile = triton.next_power_of_2(pixels), triton.next_power_of_2(width)
    return tile if tile[0] * tile[1] <= SMALL_TILE else None


def small_warps(tile: tuple[int, int]) -> int:
    """At most 64 elements a thread."""
    return 4 if tile[0] * tile[1] <= 4096 else 8


def piece_of(pixels: int, channels: int, tile: tuple[int, int]) -> int:
    """Pixels of a piece: a function of the sample's size only, so that batches do not change sums."""
    elements = min(max(pixels * channels // PIECES, MIN_PIECE), MAX_PIECE)
    return triton.cdiv(elements, tile[0] * tile[1]) * tile[0]


def group_norm_triton(
    out: torch.Tensor,
    x: torch.Tensor,
    x2: torch.Tensor | None,
    nhwc: bool,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    activation: str,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    out_scale: torch.Tensor | None,
) -> None:
    """Fills contiguous out from contiguous x: [B, H, W, C] where nhwc, else [B, C, ...]."""
    if out.numel() == 0:
        return
    B, C, C1 = out.shape[0], out.shape[3 if nhwc else 1], x.shape[3 if nhwc else 1]
    pixels = out[0].numel() // C
    steps = (C1, 1, C - C1) if nhwc else (1, pixels, 0)  # of pixels and channels of x, of pixels of x2
    out_pixel = C if nhwc else 1
    rows = tuple(0 if v is None else v.stride(0) for v in (scale, shift))
    silu = activation == "silu"
    tile = small_tile(pixels, C // groups)
    if tile is not None:
        group_norm_small_kernel[(B * groups,)](
            *(x, x2, weight, bias, scale, shift, out, out_scale, pixels, groups, C1, C, *steps, out_pixel, eps, *rows),
            SILU=silu,
            PIXELS=tile[0],
            CHANNELS=tile[1],
            ALIGNED=math.gcd(C // groups, 8),
            num_warps=small_warps(tile),
        )
        return
    PIXELS, CHANNELS = tile = tile_of(TILE, pixels, C, nhwc)
    piece, columns = piece_of(pixels, C, tile), triton.cdiv(C, CHANNELS)
    pieces = triton.cdiv(pixels, piece)
    plane = B * pieces * C
    scratch = torch.empty(2 * plane + 3 * B * C, dtype=torch.float32, device=x.device)
    partial, applied = scratch[: 2 * plane], scratch[2 * plane :]
    group_norm_stats_kernel[(B * pieces * columns,)](
        *(x, x2, partial, pixels, C1, C, *steps, piece, pieces, columns, plane),
        PIXELS=PIXELS,
        CHANNELS=CHANNELS,
        **STATS_OPTIONS,
    )
    group_norm_finalize_kernel[(B * groups,)](
        *(partial, weight, bias, scale, shift, applied, pixels, groups, C, piece, pieces, plane, B, eps, *rows),
        BLOCK=FINALIZE_BLOCK,
        **FINALIZE_OPTIONS,
    )
    PIXELS, CHANNELS = tile_of(APPLIED_TILE, pixels, C, nhwc)
    tiles, columns = triton.cdiv(pixels, PIXELS * APPLIED_TILES), triton.cdiv(C, CHANNELS)
    group_norm_apply_kernel[(B * tiles * columns,)](
        *(x, x2, applied, out, out_scale, pixels, C1, C, *steps, out_pixel, tiles, columns, B),
        SILU=silu,
        PIXELS=PIXELS,
        CHANNELS=CHANNELS,
        TILES=APPLIED_TILES,
        **APPLY_OPTIONS,
    )
