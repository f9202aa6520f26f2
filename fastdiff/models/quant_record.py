"""What a quantized checkpoint must hold: the record in its metadata against the tensors.

`fastdiff.quant` in the metadata is a JSON object: name of the layer -> `bits`, `group`, `in_features`, `sym`. The
layer `name` stores `name.qweight` (`[out, in * bits / 8]` uint8), `name.scales` (`[out, in / group]`) and, unless
`sym` is true, `name.zeros` of the shape of the scales.
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
_PACKED = ".qweight"


def check_quant_layout(layout: Layout, metadata: Mapping[str, str], refuse: Refuse) -> None:
    """Call `refuse(reason, tensor)` unless every quantized layer has a record and tensors that agree with it."""
    records = _records(metadata, refuse)
    for name, (dtype, shape) in layout.items():
        if not name.endswith(_PACKED):
            continue
        stem = name.removesuffix(_PACKED)
        record = records.get(stem)
        if not isinstance(record, dict):
            refuse(f"no entry for it in the metadata {QUANT}", name)
        bits, group, features = (record.get(key) for key in ("bits", "group", "in_features"))
        if type(bits) is not int or bits not in (4, 8):
            refuse("bits must be 4 or 8", name)
        if type(group) is not int or group <= 0 or group % 16:
            refuse("group must be a positive multiple of 16", name)
        if type(features) is not int or features <= 0 or features % group:
            refuse("in_features must be a positive multiple of group", name)
        if dtype != "U8" or len(shape) != 2 or shape[1] * 8 != features * bits:
            refuse("packed weight must be U8 [out, in_features * bits / 8]", name)
        expected = (shape[0], features // group)
        scale_dtype, scale_shape = layout.get(f"{stem}.scales", (None, None))
        if scale_dtype not in ("F32", "F16", "BF16") or scale_shape != expected:
            refuse(f"scales must be floating-point {expected}", name)
        if record.get("sym") is not True and layout.get(f"{stem}.zeros", (None, None))[1] != expected:
            refuse(f"zeros must be {expected} unless sym is true", name)


def check_quant_values(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], refuse: Refuse) -> None:
    """Call `refuse(reason, tensor)` for scales that are not in (0, 1e4) and zero points that `bits` cannot hold."""
    for stem, record in _records(metadata, refuse).items():
        if f"{stem}{_PACKED}" not in tensors:
            continue
        scales, zeros = tensors[f"{stem}.scales"].float(), tensors.get(f"{stem}.zeros")
        # written so that NaN fails
        if not bool(((scales > 0) & (scales < MAX_SCALE)).all()):
            refuse(f"scales must be finite, positive and below {MAX_SCALE:g}", f"{stem}.scales")
        if zeros is not None and not bool(((zeros >= 0) & (zeros < 1 << record["bits"])).all()):
            refuse(f"zeros must be from 0 to 2^{record['bits']} - 1", f"{stem}.zeros")


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
