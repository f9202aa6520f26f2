"""What tests/aot_compile.py compiles: every kernel in every configuration that its launcher can choose."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import triton.language as tl
from triton.compiler import ASTSource

from fastdiff.kernels import (
    activate,
    copy,
    depthwise_conv2d,
    gram,
    group_norm,
    linear_attention,
    norm_modulate,
    philox_normal,
    qk_norm_rope,
    quantize_rows,
    quantize_static,
    resample,
    row_blocks,
    scale_channels,
    solver_step,
)

ARCHS = (80, 90, 100, 120)
_KNOWN = {"tick_ptr": "*i32", "meta_ptr": "*i32", "rows_ptr": "*i32", "source_ptr": "*i32", "seed_ptr": "*i64"}
_KNOWN |= {"step_ptr": "*i32", "stream_ptr": "*i32", "eps": "fp32", "steps_ptr": "*fp32", "scales_ptr": "*fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, and what must be in its machine code.

    build    makes source and options
    archs    what it is compiled for
    wide     128-bit loads at least
    opcodes  per architecture, instructions of which there must be some
    stack    bytes per thread that may be spilled
    blocks   of it that a multiprocessor must have room for
    fast     compiled in the default run of the tests
    """

    build: Callable[[], tuple[ASTSource, dict]]
    archs: tuple[int, ...] = ARCHS
    wide: int = 0
    opcodes: tuple[tuple[int, tuple[str, ...]], ...] = ()
    stack: int = 0
    blocks: int = 1
    fast: bool = False


def source(kernel, types: dict[str, str], constants: dict, aligned: tuple[str, ...]) -> ASTSource:
    """Unnamed arguments are int32; pointers and `aligned` sizes are multiples of 16, as at run time."""
    signature, attrs = {}, {}
    for position, name in enumerate(kernel.arg_names):  # positions count constants too
        signature[name] = "constexpr" if name in constants else types.get(name, _KNOWN.get(name, "i32"))
        if name not in constants and (signature[name].startswith("*") or name in aligned):
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attrs)


def _step(
    model: str, outputs: int, slots: int, state: str = "fp32", flat: bool = True, field: bool = False, extra=False
):
    types = {f"{name}_ptr": "*" + state for name in ("x", "history", "aux", "coef")}
    types |= {"input_ptr": "*bf16"} | {f"m{j}_ptr": "*" + model for j in range(outputs)}
    constants = {"OUTPUTS": outputs, "SLOTS": slots, "FLAT": flat, "FIELD": field, "BLOCK": solver_step.BLOCK}
    constants |= {f"m{j}_ptr": None for j in range(outputs, 4)} | (
        {} if extra else {"aux_ptr": None, "source_ptr": None}
    )
    constants |= {f"m{j}_stride_e": 1 for j in range(outputs)} if flat else {}
    aligned = ("n", *(f"m{j}_stride_b" for j in range(4)))
    return source(solver_step.solver_step_kernel, types, constants, aligned), solver_step.OPTIONS


def _gram(dtype: str, count: int):
    types = {f"v{i}_ptr": "*" + dtype for i in range(count)} | {"partial_ptr": "*fp64"}
    constants = {f"v{i}_ptr": None for i in range(count, gram.MAX_OPERANDS)}
    constants |= {f"v{i}_stride_e": 1 for i in range(count)}
    constants |= {"N": count, "FLAT": True, "BLOCK": gram.BLOCK, "LANES": gram.LANES, "CHUNK": gram.CHUNK}
    constants["TYPE"] = tl.float64 if dtype == "fp64" else tl.float32
    aligned = ("n", *(f"v{i}_stride_b" for i in range(count)))
    return source(gram.gram_kernel, types, constants, aligned), gram.OPTIONS


def _normal():
    types = {"out_ptr": "*fp32"}
    constants = {"BLOCK": philox_normal.BLOCK}
    return source(philox_normal.philox_normal_kernel, types, constants, ("n",)), philox_normal.OPTIONS


def _finish():
    types, constants = {"partial_ptr": "*fp64", "out_ptr": "*fp64"}, {"N": 4, "BLOCK": gram.FINISH_BLOCK}
    return source(gram.gram_finish_kernel, types, constants, ()), {"num_warps": 1}


# 128-bit loads of a guided step on contiguous tensors: one 1024-element block is two words a thread of float32 (x, history)
# and one of bfloat16, per operand
SOLVER = {
    "philox_normal": Case(_normal, fast=True),
    "solver_step: guided bf16, 2 slots": Case(lambda: _step("bf16", 2, 2), wide=2 + 2 * 1 + 2 * 2, fast=True),
    "solver_step: guided fp32, 3 slots": Case(lambda: _step("fp32", 2, 3), wide=2 + 2 * 2 + 3 * 2, fast=True),
    "solver_step: everything, fp32": Case(
        lambda: _step("fp32", 4, 5, extra=True), wide=2 + 4 * 2 + 5 * 2 + 2 * 2, fast=True
    ),
    "solver_step: strided fp16": Case(lambda: _step("fp16", 2, 2, flat=False), fast=True),
    "solver_step: coefficient fields": Case(lambda: _step("fp32", 2, 2, flat=False, field=True), fast=True),
    "solver_step: float64": Case(lambda: _step("fp32", 2, 3, state="fp64"), fast=True),
    "gram: 2 fp32": Case(lambda: _gram("fp32", 2), wide=2, fast=True),
    "gram: 4 bf16": Case(lambda: _gram("bf16", 4), fast=True),
    "gram: 8 fp32": Case(lambda: _gram("fp32", 8), wide=8, fast=True),
    "gram: 3 fp64": Case(lambda: _gram("fp64", 3), fast=True),
    "gram_finish": Case(_finish, fast=True),
}


def _activate(kind: str, gated: bool):
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    constants = {"KIND": kind, "GATED": gated, "BLOCK": activate.BLOCK}
    return source(activate.activate_kernel, types, constants, ("n", "x_stride")), activate.OPTIONS


def _quantize(block: row_blocks.RowBlock, loop: bool = False):
    types = {"x_ptr": "*bf16", "codes_ptr": "*i8"}
    constants = {"ROWS": block.rows, "COLUMNS": block.columns, "LOOP": loop}
    made = source(quantize_rows.quantize_rows_kernel, types, constants, ("n", "x_stride"))
    return made, {"num_warps": block.warps}


def _norm(block: row_blocks.RowBlock, codes: bool = False, gated: bool = False):
    names = ("x_ptr", "scale_ptr", "shift_ptr", *(("y_ptr", "gate_ptr", "total_ptr") if gated else ()))
    types = {name: "*bf16" for name in names} | {"out_ptr": "*i8" if codes else "*bf16"}
    absent = {"weight_ptr", "bias_ptr"} | (set() if codes else {"steps_ptr"})
    absent |= set() if gated else {"y_ptr", "gate_ptr", "total_ptr"}
    constants = {name: None for name in absent} | {"LAYER": True, "ROWS": block.rows, "COLUMNS": block.columns}
    aligned = ("n", *(f"{name}_stride_{d}" for name in ("x", "y") for d in "bn"))
    aligned += tuple(f"{name}_stride_b" for name in ("gate", "scale", "shift"))
    return source(norm_modulate.norm_modulate_kernel, types, constants, aligned), {"num_warps": block.warps}


def _rope(head_dim: int, interleaved: bool):
    heads, pairs = qk_norm_rope.heads_and_pairs(24, head_dim)
    types = {f"{name}_ptr": "*bf16" for name in ("x", "weight", "cos", "sin", "out")}
    constants = {"NORM": True, "INTERLEAVED": interleaved, "HEADS": heads, "PAIRS": pairs}
    aligned = ("n", "half", "x_stride_b", "x_stride_n", "x_stride_h", "out_stride_b")
    aligned += tuple(f"{name}_stride_{d}" for name in ("cos", "sin") for d in "bn")
    return source(qk_norm_rope.qk_norm_rope_kernel, types, constants, aligned), qk_norm_rope.OPTIONS


def _group_norm(kernel: str, options: dict, tile: tuple[int, int], nhwc: bool = True, two: bool = False, codes=False):
    types = {"x_ptr": "*bf16", "x2_ptr": "*bf16", "partial_ptr": "*fp32", "applied_ptr": "*fp32"}
    types |= {"out_ptr": "*i8" if codes else "*bf16", "out_scale_ptr": "*fp32"}
    types |= {f"{name}_ptr": "*bf16" for name in ("weight", "bias", "scale", "shift")}
    constants = {"SILU": True, "PIXELS": tile[0], "CHANNELS": tile[1], "ALIGNED": 8, "TILES": group_norm.APPLIED_TILES}
    constants |= {"BLOCK": group_norm.FINALIZE_BLOCK, "scale_ptr": None, "shift_ptr": None}
    constants |= {} if two else {"x2_ptr": None}
    constants |= {} if codes else {"out_scale_ptr": None}
    constants |= {"x_channel": 1} if nhwc else {"x_pixel": 1, "out_pixel": 1}
    made = getattr(group_norm, f"group_norm_{kernel}_kernel")
    constants = {name: value for name, value in constants.items() if name in made.arg_names}
    aligned = ("pixels", "C1", "C", "x_pixel", "x_channel", "x2_pixel", "out_pixel", "piece", "plane")
    return source(made, types, constants, aligned), options


def _resample(average: bool):
    PIXELS, CHANNELS = resample.tile_of(320)
    constants = {"AVERAGE": average, "PIXELS": PIXELS, "CHANNELS": CHANNELS}
    made = source(resample.resample_kernel, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, constants, ("C",))
    return made, resample.OPTIONS


def _copy(transposed: bool, out: str):
    sides = (copy.SQUARE, copy.SQUARE) if transposed else (1, copy.LINE)
    constants = {"A": sides[0], "B": sides[1], "from_a" if transposed else "from_b": 1, "to_b": 1}
    aligned = ("size_a", "size_b", "from_a", "from_b", "to_a")
    aligned += tuple(f"{name}{i}" for name in ("from", "to") for i in range(copy.OUTER))
    return source(copy.copy_kernel, {"x_ptr": "*bf16", "out_ptr": out}, constants, aligned), copy.OPTIONS


def _scale():
    ROWS, COLUMNS = row_blocks.tile_of(1152)
    types = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "out_ptr": "*bf16"}
    made = source(scale_channels.scale_channels_kernel, types, {"ROWS": ROWS, "COLUMNS": COLUMNS}, ("n", "x_stride"))
    return made, scale_channels.OPTIONS


def _static(offset: bool):
    ROWS, COLUMNS = row_blocks.tile_of(320)
    types = {"x_ptr": "*bf16", "scale_ptr": "*fp32", "offset_ptr": "*fp32", "codes_ptr": "*i8"}
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS} | ({} if offset else {"offset_ptr": None})
    made = source(quantize_static.quantize_static_kernel, types, constants, ("n", "width", "x_stride"))
    return made, quantize_static.OPTIONS


def _depthwise(gated: bool):
    types = {"x_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {"GATED": gated, "PIXELS": depthwise_conv2d.PIXELS, "CHANNELS": depthwise_conv2d.CHANNELS}
    made = source(depthwise_conv2d.depthwise_conv2d_kernel, types, constants, ("channels", "n"))
    return made, depthwise_conv2d.OPTIONS


def _linear_attention(kernel: str, head_dim: int, dtype: str):
    sizes = linear_attention.sizes_of(head_dim)
    types = {f"{name}_ptr": "*" + dtype for name in ("q", "k", "v", "out")}
    types |= {"sums_ptr": "*fp32", "totals_ptr": "*fp32"}
    constants = {"D": head_dim, "WIDTH": sizes.width, "PART": sizes.part, "PIECES": linear_attention.PIECES}
    constants |= {"KEYS": linear_attention.KEYS, "QUERIES": linear_attention.QUERIES}
    made = getattr(linear_attention, f"linear_attention{kernel}_kernel")
    constants = {name: value for name, value in constants.items() if name in made.arg_names}
    aligned = tuple(f"{name}_stride_{d}" for name in "qkv" for d in "bnmh")
    return source(made, types, constants, aligned), sizes.options


def _rows() -> Iterator[tuple[str, Case]]:
    """All entries of the table on sm_90, the widest of one and of several warps elsewhere."""
    for block in row_blocks.ROW_BLOCKS:
        archs = ARCHS if block.columns in (2048, row_blocks.MAX_COLUMNS) else (90,)
        each = block.rows * block.columns // block.warps // 32 // 8  # 16-byte loads a thread and operand
        label = f"{block.rows} x {block.columns}"
        yield f"quantize_rows: {label}", Case(lambda b=block: _quantize(b), archs, each)
        yield f"norm_modulate: {label}", Case(lambda b=block: _norm(b), archs, each)
        yield f"norm_modulate_int8: {label}", Case(lambda b=block: _norm(b, codes=True), archs, each)
        yield f"gated_norm_modulate: {label}", Case(lambda b=block: _norm(b, gated=True), archs, 2 * each)
    yield "quantize_rows: loop", Case(lambda: _quantize(row_blocks.ROW_BLOCKS[-1], True), wide=4)


def _images() -> Iterator[tuple[str, Case]]:
    stats, apply = group_norm.STATS_OPTIONS, group_norm.APPLY_OPTIONS
    for channels in (320, 1280):
        tile = group_norm.tile_of(group_norm.TILE, 4096, channels, True)
        label = f"{tile[0]} x {tile[1]}"
        yield f"group_norm_stats: {label}", Case(lambda t=tile: _group_norm("stats", stats, t), wide=2)
        tile = group_norm.tile_of(group_norm.APPLIED_TILE, 4096, channels, True)
        label = f"{tile[0]} x {tile[1]}"
        yield f"group_norm_apply: {label}", Case(lambda t=tile: _group_norm("apply", apply, t), wide=8)
    two = lambda t=tile: _group_norm("apply", apply, t, two=True, codes=True)
    yield "group_norm_apply: two, int8", Case(two, (90,), wide=16)
    for pixels in (512, 4096):
        stats_tile = group_norm.tile_of(group_norm.TILE, pixels, 320, False)
        apply_tile = group_norm.tile_of(group_norm.APPLIED_TILE, pixels, 320, False)
        label = f"{pixels} pixels"
        first = lambda t=stats_tile: _group_norm("stats", stats, t, nhwc=False)
        last = lambda t=apply_tile: _group_norm("apply", apply, t, nhwc=False)
        yield f"group_norm_nchw_stats: {label}", Case(first, (90,), wide=2)
        yield f"group_norm_nchw_apply: {label}", Case(last, (90,), wide=8)
    finalize = lambda: _group_norm("finalize", group_norm.FINALIZE_OPTIONS, (0, 0))
    yield "group_norm_finalize", Case(finalize)
    for tile in ((64, 64), (256, 64)):
        small = {"num_warps": group_norm.small_warps(tile)}
        label = f"{tile[0]} x {tile[1]}"
        yield f"group_norm_small: {label}", Case(lambda t=tile, o=small: _group_norm("small", o, t))
    yield "group_norm_nchw_small", Case(lambda: _group_norm("small", {"num_warps": 8}, (256, 64), nhwc=False), (90,))
    yield "resample: nearest2x", Case(lambda: _resample(False), wide=1)
    yield "resample: average2x", Case(lambda: _resample(True), wide=4)
    yield "copy: lines", Case(lambda: _copy(False, "*bf16"), wide=1)
    yield "copy: squares, cast", Case(lambda: _copy(True, "*fp32"), wide=4)


def _small() -> Iterator[tuple[str, Case]]:
    yield "scale_channels", Case(_scale, wide=2)
    yield "quantize_static", Case(lambda: _static(False), wide=2)
    yield "quantize_static: offset", Case(lambda: _static(True), (90,), wide=2)
    yield "depthwise_conv2d: none", Case(lambda: _depthwise(False), (90,), wide=9)
    yield "depthwise_conv2d: swiglu", Case(lambda: _depthwise(True), wide=18)
    for head_dim, dtype, archs in ((32, "bf16", ARCHS), (256, "bf16", (80, 90)), (64, "fp32", (80, 90))):
        label = f"{head_dim}, {dtype}"
        sums = lambda d=head_dim, t=dtype: _linear_attention("_sums", d, t)
        yield f"linear_attention_sums: {label}", Case(sums, archs)
        yield f"linear_attention: {label}", Case(lambda d=head_dim, t=dtype: _linear_attention("", d, t), archs)


MEMORY = {
    **{
        f"activate: {kind}": Case(lambda k=kind: _activate(k, False), wide=1) for kind in ("gelu", "gelu_tanh", "silu")
    },
    **{f"geglu: {kind}": Case(lambda k=kind: _activate(k, True), (90,), 2) for kind in ("gelu", "gelu_tanh", "silu")},
    **dict(_rows()),
    "qk_norm_rope: 128, pairs": Case(lambda: _rope(128, True), wide=1),
    "qk_norm_rope: 128, halves": Case(lambda: _rope(128, False), wide=2),
    "qk_norm_rope: 64, pairs": Case(lambda: _rope(64, True), (90,), wide=1),
    **dict(_images()),
    **dict(_small()),
}
