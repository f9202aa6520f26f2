"""Chooses configurations of the convolution kernels and launches them."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdiff.kernels import tuned
from fastdiff.kernels.conv2d import conv2d_finish_kernel, conv2d_kernel
from fastdiff.kernels.rounding import INTERPRETED
from fastdiff.kernels.row_blocks import tile_of as finish_tile

_TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8,
}  # fmt: skip
FINISH_OPTIONS = {
    "num_warps": 4,
    "enable_fp_fusion": False,
}
MAX_SPLITS, MIN_STEPS = 8, 8  # parts of a sum; steps of each at least


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv, which kernels can call too, takes 2 us."""
    return -(-a // b)


class Tile(NamedTuple):
    """pixels and columns (outputs) at once, bytes of a step along the channels, warps, stages; tma: by descriptors.

    rate  relative speed of a multiprocessor that is full of such tiles: what products of this size reach elsewhere
    """

    pixels: int
    columns: int
    step: int
    warps: int
    stages: int
    tma: bool = False
    rate: float = 1.0

    @property
    def parts(self) -> int:
        """Of the columns at the end: 16 results a thread at once, or a quarter of all, so that few registers are needed."""
        return min(max(self.pixels * self.columns // (32 * self.warps) // 16, 1), 4)

    @property
    def options(self) -> dict[str, int | bool]:
        # multiply-adds stay apart: what follows int8 sums has the bits of the reference with every tile
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


class Sizes(NamedTuple):
    """Height and width of the input and of the result, and what conv2d says of the others; left and top of the padding."""

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    left: int
    top: int
    upsample: int


class Call(NamedTuple):
    """What a tile is chosen by: sizes, channels of each segment, outputs, what is multiplied, parts of the sum, descriptors."""

    sizes: Sizes
    channels: tuple[int, ...]
    n: int
    dtype: torch.dtype
    splits: int
    tma: bool

    @property
    def pixels(self) -> int:
        return self.sizes.batch * self.sizes.out_height * self.sizes.out_width

    @property
    def two_sums(self) -> bool:
        """Those of two int8 segments are kept apart."""
        return self.dtype == torch.int8 and len(self.channels) == 2

    @property
    def key(self) -> str:
        """What measured tiles are looked up by; pixels up to the next of 2^k and 3 * 2^(k - 1)."""
        power = triton.next_power_of_2(self.pixels)
        pixels = power * 3 // 4 if power >= 4 and self.pixels <= power * 3 // 4 else power
        kind = f"{str(self.dtype)[6:]} {self.sizes.kernel}/{self.sizes.stride}*{self.sizes.upsample}"
        shape = f"{pixels} {'+'.join(map(str, self.channels))} {self.n} /{self.splits}"
        return f"conv2d {kind} {shape}{' tma' if self.tma else ''}"


# per architecture. Chosen by registers, spills and shared memory of what tests/aot_conv2d.py compiles, not yet by time;
# two blocks of 128 x 128 share a multiprocessor of sm_90
TILES: dict[int, tuple[Tile, ...]] = {
    arch: (
        Tile(128, 128, 128, 8, stages),
        Tile(128, 64, 128, 4, narrow, rate=0.7),
        Tile(128, 16, 128, 4, narrow, rate=0.2),
    )
    for arch, stages, narrow in ((80, 4, 4), (90, 3, 3), (100, 3, 3), (120, 3, 3))
}
# stride 1 without upsampling, where channels allow descriptors
TMA_TILES: dict[int, tuple[Tile, ...]] = {
    90: (
        Tile(256, 128, 128, 8, 4, True, 1.1),
        Tile(128, 128, 128, 8, 3, True),
        Tile(128, 64, 128, 4, 3, True, 0.7),
    ),
    100: (Tile(128, 128, 128, 8, 3, True), Tile(128, 64, 128, 4, 3, True, 0.7)),
}
EXACT_TILE = Tile(64, 64, 64, 4, 2)  # float32: three TF32 products in one's place
INTERPRETED_TILE = Tile(256, 128, 64, 4, 1)


@functools.lru_cache(4096)
def tile_of(machine: tuned.Machine, call: Call) -> Tile:
    """The tile that was measured for a call in 16 or 8 bits, or else the one that should need the least time.

    That is judged by what the busiest multiprocessor has to do.
    """

    def time(tile: Tile) -> float:
        blocks = call.splits * cdiv(call.pixels, tile.pixels) * cdiv(call.n, tile.columns)
        return cdiv(blocks, machine.processors) * tile.pixels * tile.columns / tile.rate

    tiles = tiles_for(machine.arch, call)
    return tuned.choose(machine.name, call.key, tiles) or min(tiles, key=time)


def tiles_for(arch: int, call: Call) -> list[Tile]:
    """All tiles that can serve a call in 16 or 8 bits."""
    tables = (TMA_TILES[arch] if call.tma else (), TILES[arch])
    fits = lambda tile: (tile.columns > 16 or call.n <= 32) and (tile.pixels <= 128 or not call.two_sums)
    tiles = [tile for table in tables for tile in table if fits(tile)]
    return [_with_two_sums(arch, tile) for tile in tiles] if call.two_sums else tiles


def _with_two_sums(arch: int, tile: Tile) -> Tile:
    """Half of the results a thread, or else two sums spill; on sm_90 operands leave them room."""
    return tile if arch == 90 else tile._replace(columns=min(tile.columns, 64), warps=8)


@functools.lru_cache(1024)
def step_of(tile: Tile, channels: tuple[int, ...], size: int) -> int:
    """Channels at once: half a tile's step where that wastes less, or where int8 has to have 32."""
    wide = tile.step // size
    waste = lambda step: sum(-(-c // step) * step for c in channels)
    return wide // 2 if tile.step > 64 and waste(wide // 2) < waste(wide) else wide


@functools.lru_cache(1024)
def splits_of(processors: int, sizes: Sizes, n: int, channels: int) -> int:
    """Parts of the sum that are made side by side; channels: bytes of the segment with the fewest.

    A function of one sample's size: its bits do not depend on the batch.
    """
    tiles = cdiv(sizes.out_height * sizes.out_width, 128) * cdiv(n, 128)
    steps = sizes.kernel**2 * cdiv(channels, 128)
    return max(min(processors // tiles, steps // MIN_STEPS, MAX_SPLITS), 1)


@functools.lru_cache(1024)
def box_of(pixels: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile, powers of two with so many pixels.

    16 columns of one image, so that few kernels serve all sizes, unless others make a tenth fewer tiles: then of those that
    make the fewest the most square one of the fewest images.
    """
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (r * c), r, c) for r in powers for c in powers if r * c <= pixels]
    tiles = lambda box: cdiv(batch, box[0]) * cdiv(height, box[1]) * cdiv(width, box[2])
    usual = (1, pixels // 16, 16)
    best = min(boxes, key=lambda box: (tiles(box), box[0], abs(box[2] - 2 * box[1])))
    return best if tiles(best) < 0.9 * tiles(usual) else usual


def allows_descriptors(images: list[torch.Tensor], weight: torch.Tensor, sizes: Sizes) -> bool:
    """Whether TMA descriptors can describe a call: 16-byte steps, pixels that follow each other, no cast afterwards."""
    if sizes.stride != 1 or sizes.upsample != 1:
        return False
    aligned = lambda x: x.dtype == weight.dtype and x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0
    return all(aligned(x) for x in (*images, weight))


def conv2d_triton(
    out: torch.Tensor,
    segments: list[tuple[torch.Tensor, torch.Tensor | None]],
    weight: torch.Tensor,
    padded: list[int],
    sizes: Sizes,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    emb: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    tile: Tile | None = None,
    splits: int | None = None,
) -> None:
    """Fills contiguous out [B, Ho, Wo, N].

    segments   one or two (x [B, H, W, C], scale float32 [B] or [1]); scale None where weight is a float
    weight     rows of the dtype that is multiplied in; int8 meets int8 only
    padded     channels of each segment in a row of weight
    tile, splits    replace the tables'
    """
    if out.numel() == 0:
        return
    images, size, n = [x for x, _ in segments], weight.element_size(), out.shape[3]
    processors = 1 if INTERPRETED.value else tuned.machine_of(out.device.index).processors
    channels = tuple(x.shape[3] for x in images)
    splits = splits or splits_of(processors, sizes, n, min(channels) * size)
    tile = tile or _tile(images, weight, sizes, channels, n, splits)
    block = step_of(tile, channels, size)
    finishing = (bias, emb, residual, out_scale, out)
    scales = [scale for _, scale in segments] + [None] * (2 - len(segments))
    kept = None
    if splits > 1:
        codes = weight.dtype == torch.int8
        shape = (splits * (len(segments) if codes else 1), out.numel())
        kept = torch.empty(shape, dtype=torch.int32 if codes else torch.float32, device=out.device)
    _launch(images, scales, weight, padded, weight_scale, finishing, kept, sizes, tile, block, splits)
    if kept is not None:
        finish_triton(kept, splits, scales, weight_scale, *finishing)


def _tile(
    images: list[torch.Tensor], weight: torch.Tensor, sizes: Sizes, channels: tuple[int, ...], n, splits
) -> Tile:
    if INTERPRETED.value:
        return INTERPRETED_TILE
    if weight.dtype == torch.float32:
        return EXACT_TILE
    machine = tuned.machine_of(weight.device.index)
    tma = machine.arch in TMA_TILES and allows_descriptors(images, weight, sizes)
    return tile_of(machine, Call(sizes, channels, n, weight.dtype, splits, tma))


def _launch(images, scales, weight, padded, weight_scale, finishing, kept, sizes, tile, block, splits) -> None:
    out, emb = finishing[-1], finishing[1]
    n, taps = out.shape[3], sizes.kernel**2
    flat = tile.tma and sizes.kernel == 1 and sizes.left == sizes.top == 0 and out.shape[1:3] == images[0].shape[1:3]
    seen = images
    if flat:  # one row of pixels: tiles are full whatever the image's size
        pixels = out[..., 0].numel()
        seen = [x.view(1, 1, pixels, x.shape[3]) for x in images]
        sizes = sizes._replace(batch=1, height=1, width=pixels, out_height=1, out_width=pixels)
    box = (1, 1, tile.pixels)
    if tile.tma:
        box = box_of(tile.pixels, sizes.batch, sizes.out_height, sizes.out_width)
    tiles = _tiles(box, sizes, tile.tma)
    columns = cdiv(n, tile.columns)
    weights = [weight, weight[:, taps * padded[0] :]][: len(images)]
    operands = [v for x, w in zip(seen, weights, strict=True) for v in (x, w)]
    if tile.tma:
        operands = [
            v
            for x, w, p in zip(seen, weights, padded, strict=True)
            for v in _descriptors(x, w, taps, p, box, tile.columns, block)
        ]
    operands += [None] * (4 - len(operands))
    channels = [x.shape[3] for x in images] + [0] * (2 - len(images))
    conv2d_kernel[(tiles * columns, splits)](
        *(*operands, *scales, weight_scale, *finishing, kept),
        *(sizes.batch, sizes.height, sizes.width, sizes.out_height, sizes.out_width),
        *(out.numel() // n, out.shape[1] * out.shape[2]),
        *(*channels, *padded, *[0] * (2 - len(padded)), weight.stride(0), n, sizes.left, sizes.top, columns, splits),
        *(0 if emb is None else emb.stride(0), *(_stride(scale) for scale in scales)),
        KERNEL=sizes.kernel,
        STRIDE=sizes.stride,
        UPSAMPLE=sizes.upsample,
        IMAGES=box[0],
        ROWS=box[1],
        COLUMNS=box[2],
        BLOCK_N=tile.columns,
        BLOCK_K=block,
        DTYPE=_TYPES[weight.dtype],
        PARTS=tile.parts,
        PRECISION="tf32x3" if weight.dtype == torch.float32 else "ieee",
        TMA=tile.tma,
        **tile.options,
    )


def _tiles(box: tuple[int, int, int], sizes: Sizes, tma: bool) -> int:
    if not tma:
        return cdiv(sizes.batch * sizes.out_height * sizes.out_width, box[2])
    extents = zip((sizes.batch, sizes.out_height, sizes.out_width), box, strict=True)
    images, rows, columns = (cdiv(extent, side) for extent, side in extents)
    return images * rows * columns


def _stride(scale: torch.Tensor | None) -> int:
    """From one sample's scale to the next one's."""
    return 0 if scale is None or scale.shape[0] == 1 else 1


def _descriptors(x, weight, taps: int, padded: int, box: tuple[int, int, int], columns: int, block: int) -> list:
    """Of the image, and of one segment's weights as [N, taps, channels]: a step that ends beyond the channels reads zeros."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = TensorDescriptor(
        weight, [weight.shape[0], taps, padded], [weight.stride(0), padded, 1], [columns, 1, block]
    )
    return [TensorDescriptor.from_tensor(x, [*box, block]), rows]


def finish_triton(
    kept: torch.Tensor,
    splits: int,
    scales: list[torch.Tensor | None],
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    emb: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fills contiguous out [B, Ho, Wo, N] from `splits` sums (of each segment that has a scale), [..., N] each."""
    n = out.shape[3]
    pixels, share = out.numel() // n, out.shape[1] * out.shape[2]
    ROWS, COLUMNS = finish_tile(n)
    columns = cdiv(n, COLUMNS)
    conv2d_finish_kernel[(cdiv(pixels, ROWS) * columns,)](
        *(kept, *scales, weight_scale, bias, emb, residual, out_scale, out, pixels, share, n, columns, splits),
        *(0 if emb is None else emb.stride(0), *(_stride(scale) for scale in scales)),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        **FINISH_OPTIONS,
    )
