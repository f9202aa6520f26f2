"""The attention kernels in every tile of their tables, for tests/aot_compile.py."""

from collections.abc import Iterator

import triton.language as tl
from aot_cases import Case, source

from fastdiff.kernels import attention, attention_int8, attention_int8_launch, attention_launch

Tile = attention_launch.Tile
# what multiplies 16 bits, int8 and e4m3 on each architecture
HALF = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)}
CODES = {80: ("IMMA", "HMMA"), 90: ("IGMMA", "QGMMA"), 120: ("IMMA", "QMMA")}
TMA = ("UTMALDG",)
SPLIT = {90: ("USETMAXREG",), 100: ("USETMAXREG",)}  # registers move from the warps that load to those that multiply
# spilled around the loop, not in it
STACK = {(80, 160): 40, (120, 160): 40, "exact": 256, "codes": 40}


def _attention(
    head_dim: int,
    tile: Tile,
    exact: bool = False,
    even: bool = True,
    single: bool = False,
    masked: bool = False,
    lse: bool = False,
):
    head, tail = attention_launch.split(head_dim)
    data = "fp32" if exact else "bf16"
    types = {name: "*" + data for name in ("q", "k", "v", "out_ptr")} | {"scale": "fp32", "lse_ptr": "*fp32"}
    types |= {"mask_ptr": "*u8", "lengths_ptr": "*i32"}
    constants = {"q_tail": None, "k_tail": None, "v_tail": None, "D": head_dim, "HEAD": head, "TAIL": tail}
    constants |= {} if masked else {"mask_ptr": None, "lengths_ptr": None}
    constants |= {} if lse else {"lse_ptr": None}
    if tile.tma:
        for name, rows in (("q", tile.queries), ("k", tile.keys), ("v", tile.keys)):
            types[name] = f"tensordesc<{data}[1,1,{rows},{head}]>"
            if tail:
                types[f"{name}_tail"] = f"tensordesc<{data}[1,1,{rows},{tail}]>"
                del constants[f"{name}_tail"]
    dtype = tl.float32 if exact else tl.bfloat16
    constants |= {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "MASK": 1 if masked else 0, "POSITIVE": not masked}
    constants |= {"SINGLE": single, "EVEN": even, "DTYPE": dtype, "WEIGHTS": dtype, "TMA": tile.tma}
    constants["PRECISION"] = "tf32x3" if exact else "ieee"
    aligned = tuple(f"{name}_stride_{d}" for name in "qkv" for d in "bnh")
    return source(attention.attention_kernel, types, constants, aligned), tile.options


def _codes(arch: int, head_dim: int, tile: Tile, values: str, even: bool = True):
    head, tail = attention_int8_launch.widths(head_dim)
    types = {"q_ptr": "*bf16", "codes": "*i8", "values": "*" + values, "out_ptr": "*bf16", "scale": "fp32"}
    types |= {"v_scale_ptr": "*fp32", "v_mean_ptr": "*fp32", "k_mean_ptr": "*fp32"}
    constants = {name: None for name in ("codes_tail", "values_tail", "mask_ptr", "lengths_ptr", "lse_ptr")}
    if tile.tma:
        types |= {
            "codes": f"tensordesc<i8[1,{tile.keys},{head}]>",
            "values": f"tensordesc<{values}[1,{head},{tile.keys}]>",
        }
        if tail:
            types["codes_tail"] = f"tensordesc<i8[1,{tile.keys},{tail}]>"
            types["values_tail"] = f"tensordesc<{values}[1,{tail},{tile.keys}]>"
            del constants["codes_tail"], constants["values_tail"]
    constants |= {"D": head_dim, "HEAD": head, "TAIL": tail, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
    constants |= {"MASK": 0, "POSITIVE": True, "EVEN": even, "TMA": tile.tma, "SPECIALIZE": False}
    made = source(
        attention_int8.attention_int8_kernel, types, constants, ("q_stride_b", "q_stride_n", "q_stride_h", "padded")
    )
    return made, attention_int8_launch.options_of(arch, head_dim, tile)


def _before_codes(kernel: str, values: str):
    types = {"k_ptr": "*bf16", "v_ptr": "*bf16", "sums_ptr": "*fp32", "codes_ptr": "*i8", "values_ptr": "*" + values}
    types |= {"v_scale_ptr": "*fp32", "v_mean_ptr": "*fp32", "k_mean_ptr": "*fp32"}
    made = getattr(attention_int8, f"attention_{kernel}_kernel")
    constants = {"lengths_ptr": None, "D": 128, "WIDTH": 128, "PADDED_WIDTH": 128, "BLOCK_N": 128}
    constants |= {"ROWS": attention_int8_launch.MEANS_ROWS, "PIECES": attention_int8_launch.PIECES}
    constants = {name: value for name, value in constants.items() if name in made.arg_names}
    aligned = ("padded", *(f"{name}_stride_{d}" for name in "kv" for d in "bnh"))
    options = attention_int8_launch.MEANS_OPTIONS if kernel == "means" else attention_int8_launch.CODES_OPTIONS
    return source(made, types, constants, aligned), options


def _half(arch: int, label: str, head_dim: int, tile: Tile, **kinds) -> tuple[str, Case]:
    needed = HALF[arch] + ((*TMA, *SPLIT[arch]) if tile.tma else ())
    build = lambda: _attention(head_dim, tile, **kinds)
    return f"attention: {label}", Case(build, (arch,), opcodes=((arch, needed),), stack=STACK.get((arch, head_dim), 0))


def _cases() -> Iterator[tuple[str, Case]]:
    for arch in (80, 90, 100, 120):
        name = f"sm_{arch}"
        for most, tile in attention_launch.TILES[arch].items():
            head_dim = {64: 64, 128: 128, 256: 160}[most]
            yield _half(arch, f"{name} {head_dim}", head_dim, tile, even=False)
        for most, tile in attention_launch.TMA_TILES.get(arch, {}).items():
            yield _half(arch, f"{name} {most}, TMA", most, tile)
        for head_dim in (64, 128) if arch in (80, 90) else (64,):
            single = attention_launch.tile_of(arch, head_dim, 77, False, False)
            yield _half(arch, f"{name} {head_dim}, 77 keys", head_dim, single, even=False, single=True)
    tma = attention_launch.TMA_TILES[90]
    for head_dim, tile in ((40, tma[128]), (72, tma[128])):
        yield _half(90, f"sm_90 {head_dim}, TMA", head_dim, tile)
    yield _half(90, "sm_90 128, TMA, uneven, LSE", 128, tma[128], even=False, lse=True)
    yield _half(90, "sm_90 128, mask and lengths", 128, attention_launch.TILES[90][128], even=False, masked=True)
    masked = attention_launch.with_mask(attention_launch.TILES[80][64])
    yield _half(80, "sm_80 64, mask and lengths", 64, masked, even=False, masked=True)
    exact = lambda: _attention(64, attention_launch.EXACT_TILE, exact=True, even=False)
    yield "attention: float32", Case(exact, (80, 90), stack=STACK["exact"])
    for arch, head_dims in ((80, (128, 160)), (90, (64, 72, 128, 160)), (120, (64, 128))):
        for head_dim in head_dims:
            tile = attention_int8_launch.tile_of(arch, head_dim)
            values = "bf16" if arch == 80 else "fp8e4nv"
            build = lambda a=arch, d=head_dim, t=tile, v=values: _codes(a, d, t, v)
            needed = ((arch, CODES[arch] + (TMA if tile.tma else ())),)
            yield f"attention_int8: sm_{arch} {head_dim}", Case(build, (arch,), opcodes=needed, stack=STACK["codes"])
    few = lambda: _codes(90, 128, attention_int8_launch.tile_of(90, 128), "bf16", even=False)
    needed = ((90, ("IGMMA", "HGMMA", *TMA)),)
    yield "attention_int8: sm_90 128, few keys", Case(few, (90,), opcodes=needed, stack=STACK["codes"])
    yield "attention_means", Case(lambda: _before_codes("means", "bf16"), (80, 90), wide=2)
    yield "attention_codes: bf16", Case(lambda: _before_codes("codes", "bf16"), (80,), wide=8)
    yield "attention_codes: e4m3", Case(lambda: _before_codes("codes", "fp8e4nv"), (90, 120), wide=8)


ATTENTION = dict(_cases())
