"""The linear kernels in every tile of their tables, for tests/aot_compile.py."""

from collections.abc import Iterator

import triton.language as tl
from aot_cases import ARCHS, Case, source

from fastdiff.kernels import linear, linear_expand, linear_tiles
from fastdiff.kernels.linear_tiles import FEW, TILES, Tile

TYPES = {"i8": (tl.int8, 1), "bf16": (tl.bfloat16, 2), "fp32": (tl.float32, 4)}
# what multiplies int8 and 16 bits on each architecture; sm_100 has int8 on its old path only
MANY = {
    "i8": {80: ("IMMA",), 90: ("IGMMA",), 100: ("IMMA",), 120: ("IMMA",)},
    "bf16": {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)},
}
COPIES = {True: ("UTMALDG",), False: ("LDGSTS",)}  # descriptors; 16 bytes to shared memory on the way past registers
# what surrounds the sums: everything, everything to codes, no activation, pairs, nothing
EPILOGUES = {
    "gelu": {"KIND": "gelu", "PAIRS": False, "gate": True, "residual": True},
    "codes": {"KIND": "gelu", "PAIRS": False, "gate": True, "residual": True},
    "gated": {"KIND": "none", "PAIRS": False, "gate": True, "residual": True},
    "geglu": {"KIND": "gelu", "PAIRS": True, "gate": False, "residual": False},
    "none": {"KIND": "none", "PAIRS": False, "gate": False, "residual": False},
}
_SIZES = ("K", "N", "wide", "padded", "group", "x_stride", "weight_stride", "gate_stride", "residual_stride")


def _linear(tile: Tile, x: str, weight: str, dtype: str, epilogue: str, grouped=False, turned=False, even=True):
    kind, size = TYPES[dtype]
    block = max(tile.line // size, 32)
    types = {f"{name}_ptr": "*fp32" for name in ("x_scale", "scale", "bias", "gate", "out_scale")}
    types |= {"residual_ptr": "*bf16", "x": "*" + x, "weight": "*" + weight}
    types["out_ptr"] = "*i8" if epilogue == "codes" else "*bf16"
    if tile.tma:
        types["x"] = f"tensordesc<{x}[{tile.rows},{block}]>"
        types["weight"] = f"tensordesc<{weight}[{tile.columns},{block}]>"
    around = EPILOGUES[epilogue]
    absent = {f"{name}_ptr" for name in ("gate", "residual") if not around[name]}
    absent |= set() if epilogue == "codes" else {"out_scale_ptr"}
    absent |= set() if x == "i8" else {"x_scale_ptr"}
    absent |= {"scale_ptr"} if weight in ("bf16", "fp32") and not grouped else set()
    constants = dict.fromkeys(absent) | {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": block}
    constants |= {"PARTS": tile.parts, "DTYPE": kind, "GROUPED": grouped, "TURNED": turned, "EVEN": even}
    constants |= {"TMA": tile.tma, "KIND": around["KIND"], "PAIRS": around["PAIRS"]}
    return source(linear.linear_kernel, types, constants, _SIZES), tile.options


def _case(arch: int, tile: Tile, *kinds, opcodes: tuple[str, ...], fast: bool = False, **how) -> Case:
    build = lambda: _linear(tile, *kinds, **how)
    return Case(build, (arch,), opcodes=((arch, opcodes),), fast=fast, blocks=tile.shared)


def _many() -> Iterator[tuple[str, Case]]:
    """All tiles, int8 and bfloat16 in turn; on sm_90 both, the widest with every epilogue. Sums by group; pointers."""
    for arch, tiles in TILES.items():
        for index, tile in enumerate(tiles):
            epilogues = {"i8": "gelu", "bf16": "gated"}
            for kind, epilogue in epilogues.items() if arch == 90 else [list(epilogues.items())[index % 2]]:
                for around in EPILOGUES if arch == 90 and index == 0 and kind == "i8" else (epilogue,):
                    name = f"linear: sm_{arch} {kind} {tile.rows} x {tile.columns}, {around}"
                    fast = (arch, index, kind) == (90, 3, "i8")
                    opcodes = MANY[kind][arch] + COPIES[tile.tma]
                    yield name, _case(arch, tile, kind, kind, kind, around, opcodes=opcodes, fast=fast)
        tile = linear_tiles.lighter(tiles[1], True)
        how = {"opcodes": MANY["i8"][arch] + COPIES[tile.tma], "grouped": True}
        yield f"linear: sm_{arch} w4a8, many rows", _case(arch, tile, "i8", "i8", "i8", "gelu", **how)
    bare = linear_tiles.lighter(TILES[90][1], False)
    for x, weight, grouped, even in (
        ("bf16", "bf16", False, False),
        ("fp32", "bf16", False, True),
        ("bf16", "bf16", True, True),
    ):
        name = f"linear: sm_90 bf16 by pointers, x {x}, grouped {grouped}"
        how = {"opcodes": MANY["bf16"][90], "grouped": grouped, "even": even}
        yield name, _case(90, bare, x, weight, "bf16", "gelu", **how)


FEW_KINDS = {
    "w8a8": ("i8", "i8", "i8"),
    "w8a16": ("bf16", "i8", "bf16"),
    "w4a16": ("bf16", "u8", "bf16"),
    "w4a8": ("i8", "u8", "i8"),
}


def _few() -> Iterator[tuple[str, Case]]:
    """Weights on the left: on sm_90 all kinds, elsewhere one for each tile."""
    for arch, tiles in FEW.items():
        for tile, label in zip(tiles, ("w8a16", "w4a16", "w4a8"), strict=True):
            for kind in FEW_KINDS if arch == 90 and tile is tiles[0] else (label,):
                opcodes = (*MANY["i8" if kind.endswith("a8") else "bf16"][arch], "LDGSTS")
                how = {"turned": True, "grouped": kind.startswith("w4")}
                name = f"linear: sm_{arch} {kind}, {tile.rows} rows"
                yield name, _case(arch, tile, *FEW_KINDS[kind], "gelu", opcodes=opcodes, **how)
        tile = linear_tiles.few_tile(arch, 1, 64, 132)
        how = {"opcodes": ("IMMA", "LDGSTS"), "turned": True, "grouped": True}
        name = f"linear: sm_{arch} w4a8, {tile.columns} columns"
        yield name, _case(arch, tile, *FEW_KINDS["w4a8"], "gelu", **how)


def _exact() -> Iterator[tuple[str, Case]]:
    for tile in linear_tiles.EXACT:
        for label, weight in (("float32", "fp32"), ("w4a16", "u8")):
            how = {"turned": weight == "u8" or tile.rows <= 16, "grouped": weight == "u8"}
            build = lambda t=tile, w=weight, h=how: _linear(t, "fp32", w, "fp32", "gelu", **h)
            yield f"linear: {label}, float32 x, {tile.rows} rows", Case(build, (90,))


def _expand(weight: str, out: str, scaled: bool):
    types = {"weight_ptr": "*" + weight, "scale_ptr": "*fp32", "out_ptr": "*" + out}
    constants = {"ROWS": linear_expand.ROWS, "BYTES": linear_expand.BYTES} | ({} if scaled else {"scale_ptr": None})
    made = source(linear_expand.linear_expand_kernel, types, constants, ("stride", "out_stride", "group"))
    return made, linear_expand.OPTIONS


def _codes():
    types = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "codes_ptr": "*i8"}
    constants = {"BLOCK": linear_expand.BLOCK}
    return source(linear_expand.linear_codes_kernel, types, constants, ("K", "x_stride")), linear_expand.OPTIONS


LINEAR = {
    **dict(_many()),
    **dict(_few()),
    **dict(_exact()),
    "linear_expand: i8 to bf16": Case(lambda: _expand("i8", "bf16", False), ARCHS, wide=1),
    "linear_expand: int4 to i8": Case(lambda: _expand("u8", "i8", False), ARCHS, wide=1),
    "linear_expand: int4 to bf16": Case(lambda: _expand("u8", "bf16", True), ARCHS, wide=1),
    "linear_codes": Case(_codes, ARCHS, wide=1),
}
