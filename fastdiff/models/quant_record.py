"""What a quantized checkpoint must hold: the records in its metadata against the tensors.

`fastdiff.quant` in the metadata is a JSON object: name of the layer -> `dtype` (a key of DTYPES), `bits`,
`in_features`, `group` (inputs that share a scale; all of them: one scale per output) and `sym`. The layer `name` stores

    name.weight        [out, in] or [out, kh, kw, C] (8 bits), [out, in / 2] uint8 (4 bits, the even code low)
    name.weight_scale  float32 [out], or [out, in / group]
    name.weight_zero   uint8 like the scale, unless `sym` is true
    name.weight_scale2 float32 [1], for nvfp4

and optionally `bias` [out], `input_scale` [1] or [steps] and `input_zero` like it, `smooth` [in], `lowrank_down`
[rank, in] with `lowrank_up` [out, rank]. Where the metadata has records, no other tensor may hold 8-bit numbers.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

Tensor = torch.Tensor
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype name, shape
Refuse = Callable[..., NoReturn]

QUANT = "fastdiff.quant"
MAX_SCALE = 1e4
# number format -> bits, dtype in the file
DTYPES = {
    "int8": (8, "I8"),
    "uint8": (8, "U8"),
    "fp8_e4m3": (8, "F8_E4M3"),
    "int4": (4, "U8"),
    "uint4": (4, "U8"),
    "nf4": (4, "U8"),
    "nvfp4": (4, "U8"),
    "mxfp4": (4, "U8"),
}
_CODES = ("U8", "I8", "F8_E4M3", "F8_E5M2")


def check_quant_layout(layout: Layout, metadata: Mapping[str, str], refuse: Refuse) -> None:
    """Call `refuse(reason, tensor)` unless every quantized layer has a record and tensors that agree with it."""
    if QUANT not in metadata:
        return
    claimed: set[str] = set()
    for stem, record in _records(metadata, refuse).items():
        claimed |= _check_layer(stem, record, layout, refuse)
    for name, (dtype, _) in layout.items():
        if dtype in _CODES and name not in claimed:
            refuse(f"no entry for it in the metadata {QUANT}", name)


def check_quant_values(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], refuse: Refuse) -> None:
    """Call `refuse(reason, tensor)` for codes, scales and zero points that no quantizer writes."""
    for stem, record in _records(metadata, refuse).items():
        get = lambda part, stem=stem: tensors.get(f"{stem}.{part}")
        for part in ("weight_scale", "weight_scale2", "input_scale", "smooth"):
            values = get(part)
            if values is None:
                continue
            # GGUF's 4-bit grid has a signed scale
            size = values.abs() if part == "weight_scale" and record["dtype"] == "int4" else values
            # the scales of nvfp4 blocks may underflow to zero; written so that NaN fails
            low = size >= 0 if part == "weight_scale" and record["dtype"] == "nvfp4" else size > 0
            if not bool((low & (size < MAX_SCALE * (100 if part == "smooth" else 1))).all()):
                refuse(f"must be finite, positive and below {MAX_SCALE:g}", f"{stem}.{part}")
        for part in ("bias", "lowrank_down", "lowrank_up"):
            values = get(part)
            if values is not None and not bool(torch.isfinite(values).all()):
                refuse("holds NaN or infinity", f"{stem}.{part}")
        zero, bits = get("weight_zero"), record["bits"]
        if zero is not None and bits < 8 and not bool((zero < 1 << bits).all()):
            refuse(f"zero points must be from 0 to 2^{bits} - 1", f"{stem}.weight_zero")
        if record["dtype"] == "int8" and bool((get("weight") == -128).any()):
            refuse("codes must be from -127 to 127", f"{stem}.weight")
        if record["dtype"] == "fp8_e4m3" and not bool(torch.isfinite(get("weight").float()).all()):
            refuse("codes must not be NaN", f"{stem}.weight")


def _check_layer(stem: str, record: Any, layout: Layout, refuse: Refuse) -> set[str]:
    """Checks one layer; returns the tensors that belong to it."""
    weight = f"{stem}.weight"
    if not isinstance(record, dict) or weight not in layout:
        refuse(f"the metadata {QUANT} names a layer without a weight", weight)
    dtype, bits, group, k = (record.get(key) for key in ("dtype", "bits", "group", "in_features"))
    if not isinstance(dtype, str) or dtype not in DTYPES or type(bits) is not int or bits != DTYPES[dtype][0]:
        refuse(f"dtype must be one of {', '.join(DTYPES)} with its bits", weight)
    if type(k) is not int or k <= 0:
        refuse("in_features must be a positive integer", weight)
    if type(group) is not int or group <= 0 or k % group or (group % 16 and group != k):
        refuse("group must be in_features or a positive multiple of 16 that divides it", weight)
    code, shape = layout[weight]
    n = shape[0] if shape else 0
    inner = (k,) if bits == 8 else (-(-k // 2),)
    image = bits == 8 and len(shape) == 4 and shape[1] * shape[2] * shape[3] == k
    if code != DTYPES[dtype][1] or not (shape[1:] == inner or image):
        refuse(f"weight must be {DTYPES[dtype][1]} [out, {inner[0]}] or [out, kh, kw, C]", weight)
    scales = (n,) if group == k else (n, k // group)
    expected = {"weight_scale": ("F32", scales)}
    if record.get("sym") is not True:
        expected["weight_zero"] = ("U8", scales)
    if dtype == "nvfp4":
        expected["weight_scale2"] = ("F32", (1,))
    _check_parts(stem, expected | _optional(stem, layout, n, k), layout, refuse)
    return {name for name in layout if name.rpartition(".")[0] == stem}


def _optional(stem: str, layout: Layout, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The optional tensors that are there, as they have to be."""
    shape_of = lambda part: layout.get(f"{stem}.{part}", ("", ()))[1]
    steps = shape_of("input_scale")[:1] or (1,)
    rank = shape_of("lowrank_down")[:1]
    wanted = {
        "bias": ("F32", (n,)),
        "smooth": ("F32", (k,)),
        "input_scale": ("F32", steps),
        "input_zero": ("U8", steps),
        "lowrank_down": ("F32", (*rank, k)),
        "lowrank_up": ("F32", (n, *rank)),
    }
    there = {part: what for part, what in wanted.items() if f"{stem}.{part}" in layout}
    if "lowrank_down" in there or "lowrank_up" in there:
        there |= {part: wanted[part] for part in ("lowrank_down", "lowrank_up")}
    if "input_zero" in there:
        there["input_scale"] = wanted["input_scale"]
    return there


def _check_parts(stem: str, expected: dict[str, tuple[str, tuple]], layout: Layout, refuse: Refuse) -> None:
    for part, (dtype, shape) in expected.items():
        if layout.get(f"{stem}.{part}") != (dtype, shape):
            refuse(f"must be {dtype} {list(shape)}", f"{stem}.{part}")
    for name in layout:
        owner, _, part = name.rpartition(".")
        if owner == stem and part != "weight" and part not in expected:
            refuse("is no part of a quantized layer", name)


def _records(metadata: Mapping[str, str], refuse: Refuse) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            refuse(f"duplicate name in the metadata {QUANT}")
        return dict(items)

    try:
        records = json.loads(metadata.get(QUANT, "{}"), object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        records = None
    if not isinstance(records, dict):
        refuse(f"metadata {QUANT} is not a JSON object")
    return records
