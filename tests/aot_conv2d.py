"""The convolution kernels in every tile of their tables, for tests/aot_compile.py."""

from collections.abc import Iterator

import torch
import triton.language as tl
from aot_attention import CODES, HALF, TMA
from aot_cases import ARCHS, Case, source

from fastdiff.kernels import conv2d, conv2d_codes, conv2d_launch, row_blocks

Tile = conv2d_launch.Tile
TYPES = {"bf16": (tl.bfloat16, 2), "fp32": (tl.float32, 4), "i8": (tl.int8, 1)}
_ALIGNED = ("channels", "channels2", "padded", "padded2", "row", "n", "emb_stride")
COPIES = ("LDGSTS",)  # straight into shared memory


def _conv(tile: Tile, data: str, step: int = 0, two=False, split=False, image: str = "", aligned=_ALIGNED, **geometry):
    """`step`: channels at once, if not all of the tile's bytes. `image`: the type of x where it is not that of the weights."""
    dtype, size = TYPES[data]
    block = step or tile.step // size
    box = conv2d_launch.box_of(tile.pixels, 2, 64, 64) if tile.tma else (1, 1, tile.pixels)
    types = {name: "*" + (image or data) for name in ("x", "x2")} | {
        name: "*" + data for name in ("weight", "weight2")
    }
    types |= {f"{name}_ptr": "*fp32" for name in ("x_scale", "x2_scale", "weight_scale", "bias", "emb", "out_scale")}
    types |= {"residual_ptr": "*bf16", "out_ptr": "*bf16", "partial_ptr": "*i32" if data == "i8" else "*fp32"}
    constants = {"out_scale_ptr": None} | ({} if split else {"partial_ptr": None})
    constants |= {} if two else {"x2": None, "weight2": None, "x2_scale_ptr": None}
    constants |= {} if data == "i8" else {"x_scale_ptr": None, "x2_scale_ptr": None, "weight_scale_ptr": None}
    if tile.tma:
        for name in ("", "2") if two else ("",):
            types[f"x{name}"] = f"tensordesc<{data}[{','.join(map(str, box))},{block}]>"
            types[f"weight{name}"] = f"tensordesc<{data}[{tile.columns},1,{block}]>"
    constants |= {"KERNEL": 3, "STRIDE": 1, "UPSAMPLE": 1} | geometry
    constants |= {"IMAGES": box[0], "ROWS": box[1], "COLUMNS": box[2], "BLOCK_N": tile.columns, "BLOCK_K": block}
    constants |= {
        "DTYPE": dtype,
        "PARTS": tile.parts,
        "PRECISION": "tf32x3" if data == "fp32" else "ieee",
        "TMA": tile.tma,
    }
    return source(conv2d.conv2d_kernel, types, constants, aligned), tile.options


def _finish(data: str):
    ROWS, COLUMNS = row_blocks.tile_of(1280)
    types = {f"{name}_ptr": "*fp32" for name in ("x_scale", "x2_scale", "weight_scale", "bias", "emb", "out_scale")}
    types |= {"partial_ptr": "*" + data, "residual_ptr": "*bf16", "out_ptr": "*bf16"}
    constants = {"x2_scale_ptr": None, "out_scale_ptr": None, "ROWS": ROWS, "COLUMNS": COLUMNS}
    constants |= {} if data == "i32" else {"x_scale_ptr": None, "weight_scale_ptr": None}
    made = source(conv2d.conv2d_finish_kernel, types, constants, ("n", "emb_stride"))
    return made, conv2d_launch.FINISH_OPTIONS


def _codes(kernel: str):
    types = {"x_ptr": "*bf16", "bits_ptr": "*i32", "codes_ptr": "*i8", "scale_ptr": "*fp32"}
    made = getattr(conv2d_codes, f"sample_{kernel}_kernel")
    constants = {"BLOCK": conv2d_codes.BLOCK, "PIECES": conv2d_codes.MAX_PIECES}
    constants = {name: value for name, value in constants.items() if name in made.arg_names}
    return source(made, types, constants, ("size", "piece")), conv2d_codes.OPTIONS


def _case(arch: int, tile: Tile, data: str, label: str = "", fast: bool = False, **options) -> tuple[str, Case]:
    kind = "conv2d_w8a8" if data == "i8" else "conv2d"
    # Hopper's and older products of int8; sm_100 has them on its old path only
    product = (CODES.get(arch, ("IMMA",))[0],) if data == "i8" else HALF[arch]
    needed = product + (TMA if tile.tma else COPIES)
    name = f"{kind}: sm_{arch} {tile.pixels} x {tile.columns}{', TMA' if tile.tma else ''}{label}"
    return name, Case(lambda: _conv(tile, data, **options), (arch,), opcodes=((arch, needed),), fast=fast)


def _cases() -> Iterator[tuple[str, Case]]:
    for arch in ARCHS:
        for tile in (*conv2d_launch.TMA_TILES.get(arch, ()), *conv2d_launch.TILES[arch]):
            largest = arch == 90 and tile == conv2d_launch.TMA_TILES[90][0]
            yield _case(arch, tile, "bf16")
            yield _case(arch, tile, "i8", fast=largest)
        sizes = conv2d_launch.Sizes(2, 64, 64, 64, 64, 3, 1, 1, 1, 1)
        call = conv2d_launch.Call(sizes, (64, 64), 1280, torch.int8, 1, arch in conv2d_launch.TMA_TILES)
        both = conv2d_launch.tiles_for(arch, call)[0]
        yield _case(arch, both, "i8", ", two segments", two=True)
    first, wide = conv2d_launch.TILES[80][0], conv2d_launch.TMA_TILES[90][0]
    yield _case(80, first, "bf16", ", stride 2", STRIDE=2)
    yield _case(80, first, "i8", ", upsampled, half steps", UPSAMPLE=2, step=64)
    yield _case(90, conv2d_launch.TILES[90][0], "i8", ", two segments", two=True)
    yield _case(90, wide, "i8", ", split", split=True)
    few = lambda: _conv(conv2d_launch.TILES[90][0], "bf16", 32, aligned=("row", "n", "emb_stride"))
    yield "conv2d: few channels", Case(few, (80, 90), opcodes=((80, HALF[80]), (90, HALF[90])))
    mixed = lambda: _conv(conv2d_launch.TILES[90][0], "bf16", image="fp32")
    yield "conv2d: float32 meets bfloat16", Case(mixed, (90,), opcodes=((90, HALF[90]),))
    exact = lambda: _conv(conv2d_launch.EXACT_TILE, "fp32")
    yield "conv2d: float32", Case(exact, (80, 90, 100))
    yield "conv2d_finish: float32", Case(lambda: _finish("fp32"), (90,), wide=4)
    yield "conv2d_finish: int32", Case(lambda: _finish("i32"), (80, 90), wide=4)
    yield "conv2d_finish: bfloat16", Case(lambda: _finish("bf16"), (90,), wide=4)
    yield "sample_magnitudes", Case(lambda: _codes("magnitudes"), (80, 90), wide=4)
    yield "sample_codes", Case(lambda: _codes("codes"), (80, 90), wide=4)


CONV2D = dict(_cases())
