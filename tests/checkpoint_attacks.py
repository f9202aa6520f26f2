"""Hostile checkpoint files, each with what is wrong with it as its name."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator

QUANT_RECORD = {"dtype": "int8", "bits": 8, "group": 16, "in_features": 16, "sym": True}
ONES = struct.pack("<2f", 1.0, 1.0)


def packed(header: dict | None, data: bytes = b"", length: int | None = None, raw: bytes | None = None) -> bytes:
    raw = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def record(shape: list, offsets: list, dtype: str = "F32", **more: str) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def quantized(layer: dict | None, scales: dict | None = None, data: bytes = bytes(32) + ONES) -> bytes:
    header = {"__metadata__": {"fastdiff.quant": json.dumps({"l": layer} if layer else {})}}
    header["l.weight"] = record([2, 16], [0, 32], "I8")
    return packed(header | ({"l.weight_scale": scales} if scales else {}), data)


def quantized_good() -> bytes:
    return quantized(QUANT_RECORD, record([2], [32, 40]))


def header_attacks() -> Iterator[tuple[str, bytes]]:
    z = bytes(16)
    one = record([4], [0, 16])
    text = b'"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}'
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(1))
    yield "empty", b""
    yield "seven bytes", bytes(7)
    yield "length 2^64-1", packed({}, length=2**64 - 1)
    yield "length 2^63", packed({}, length=2**63)
    yield "length one past the end", packed({}, length=3)
    yield "header cut short", packed({"a": one}, z)[:20]
    yield "length 99 MB on a tiny file", packed({}, length=99_000_000)
    yield "not utf-8", packed(None, raw=b'{"\xff\xfe":1}')
    yield "not json", packed(None, raw=b"{hello}")
    yield "json array", packed(None, raw=b"[]")
    yield "deep nesting", packed(None, raw=b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}")
    yield "duplicate tensor", packed(None, z, raw=b"{" + text % b"4" + b"," + text % b"4" + b"}")
    yield "NaN in header", packed(None, z, raw=b"{" + text % b"NaN" + b"}")
    yield "4000-digit integer", packed(None, z, raw=b"{" + text % (b"9" * 4000) + b"}")
    yield "float dims", packed({"a": record([4.0], [0, 16])}, z)
    yield "bool dims", packed({"a": record([True, 4], [0, 16])}, z)
    yield "string dims", packed({"a": record(["4"], [0, 16])}, z)
    yield "negative dim", packed({"a": record([-4], [0, 16])}, z)
    yield "product wraps 2^64 to 4", packed({"a": record([4194305, 4194305, 211106198978564], [0, 16])}, z)
    yield "numel over data", packed({"a": record([5], [0, 16])}, z)
    yield "end before begin", packed({"a": record([0], [16, 0])}, z)
    yield "end past file", packed({"a": record([8], [0, 32])}, z)
    yield "offset 2^63", packed({"a": record([4], [2**63, 2**63 + 16])}, z)
    yield "overlap", packed({"a": one, "b": one}, z)
    yield "gap", packed({"a": record([2], [0, 8]), "b": record([1], [12, 16])}, z)
    yield "tail bytes", packed({"a": record([2], [0, 8])}, z)
    yield "bad dtype", packed({"a": record([4], [0, 16], "COMPLEX1024")}, z)
    yield "extra field", packed({"a": record([4], [0, 16], hook="os.system")}, z)
    yield "rank 5000", packed({"a": record([1] * 5000 + [4], [0, 16])}, z)
    yield "traversal name", packed({"../../etc/cron.d/x": one}, z)
    yield "absolute name", packed({"/etc/x": one}, z)
    yield "NUL in name", packed({"a\0b": one}, z)
    yield "100k names", packed({f"t{i:06d}": record([0], [0, 0]) for i in range(100000)})
    yield "metadata not strings", packed({"__metadata__": {"a": {"b": 1}}, "x": one}, z)
    yield "pickle", pickle.dumps({"a": 1}, 4)
    yield "torch zip", archive.getvalue()


def quant_attacks() -> Iterator[tuple[str, bytes]]:
    scales = record([2], [32, 40])
    yield "quant: no record", quantized(None, scales)
    for key, value in (("bits", 3), ("bits", True), ("group", 0), ("group", 7), ("group", -16), ("group", 16.0)):
        yield f"quant: {key} {value}", quantized(QUANT_RECORD | {key: value}, scales)
    yield "quant: in_features lies", quantized(QUANT_RECORD | {"in_features": 1 << 40}, scales)
    yield "quant: scales missing", quantized(QUANT_RECORD, None, bytes(32))
    yield "quant: scales wrong shape", quantized(QUANT_RECORD, record([1, 2], [32, 40]))
    yield "quant: asymmetric without zeros", quantized(QUANT_RECORD | {"sym": False}, scales)
    broken = {
        "__metadata__": {"fastdiff.quant": "{{{"},
        "l.weight": record([2, 16], [0, 32], "I8"),
        "l.weight_scale": scales,
    }
    yield "quant: metadata not json", packed(broken, bytes(32) + ONES)
    yield "quant: dtype int3", quantized(QUANT_RECORD | {"dtype": "int3"}, scales)
    yield "quant: weight missing", packed({"__metadata__": {"fastdiff.quant": json.dumps({"m": QUANT_RECORD})}})
    yield "quant: code -128", quantized(QUANT_RECORD, scales, b"\x80" + bytes(31) + ONES)
    # names of another layout, as the recipes of the specification have them
    other = {"l.qweight": record([2, 16], [0, 32], "U8"), "l.scales": record([2, 1], [32, 40])}
    meta = {"__metadata__": {"fastdiff.quant": json.dumps({"l": QUANT_RECORD})}}
    yield "quant: names of another layout", packed(meta | other, bytes(32) + ONES)
    more = {"l.weight": record([2, 16], [0, 32], "I8"), "l.weight_scale": scales, "l.sparkle": record([1], [40, 44])}
    yield "quant: a part that no layer has", packed(meta | more, bytes(32) + ONES + ONES[:4])
    for value in (float("nan"), float("inf"), 0.0, -1.0, 2e4):
        yield f"quant: scale {value}", quantized(QUANT_RECORD, scales, bytes(32) + struct.pack("<2f", 1.0, value))


ATTACKS = {name: blob for attacks in (header_attacks(), quant_attacks()) for name, blob in attacks}
