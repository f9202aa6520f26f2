"""Header of a safetensors file: JSON that maps names to dtype, shape and position, checked without mercy."""

import json
import math
import os
import re
from typing import Any, NoReturn

import torch

from .quant_record import check_quant_layout

Span = tuple[str, tuple[int, ...], int, int]  # dtype name, shape, first byte, byte after the last

MAX_HEADER = 16 << 20
MAX_TENSORS = 65536
MAX_RANK = 8
MAX_DIM = 1 << 31
MAX_DIGITS = 19
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,512}\Z")


class CheckpointError(ValueError):
    """A file that cannot be trusted; the message names the file, the tensor and the reason."""

    def __init__(self, reason: str, tensor: str | None = None, file: str | os.PathLike | None = None) -> None:
        super().__init__(reason, tensor, file)
        self.reason, self.tensor, self.file = reason, tensor, file

    def __str__(self) -> str:
        # a hostile name may be long, or hold what a terminal obeys
        plain = self.tensor is None or is_tensor_name(self.tensor)
        tensor = None if self.tensor is None else f"tensor {self.tensor if plain else repr(self.tensor[:80])}"
        return ": ".join(str(part) for part in (self.file, tensor, self.reason) if part is not None)


def refuse(reason: str, tensor: str | None = None) -> NoReturn:
    """Raise CheckpointError; the caller that knows the file adds its name."""
    raise CheckpointError(reason, tensor)


def parse_header(raw: bytes, data_bytes: int) -> tuple[dict[str, Span], dict[str, str]]:
    """Check the JSON header against the number of data bytes; return the spans by name and the metadata."""
    header = parse_json(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        refuse("metadata must map strings to strings")
    if len(header) > MAX_TENSORS:
        refuse(f"more than {MAX_TENSORS} tensors")
    spans = {name: _parse_record(name, record, data_bytes) for name, record in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != at:
            refuse("gap or overlap before its data", name)
        at = end
    if at != data_bytes:
        refuse("bytes left over after the last tensor")
    check_quant_layout({name: span[:2] for name, span in spans.items()}, metadata, refuse)
    return spans, metadata


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may have this name: no path that leads anywhere, no control characters."""
    return bool(_NAME.match(name)) and ".." not in name and not name.startswith("/")


def parse_json(raw: bytes) -> dict[str, Any]:
    """Return the object that the bytes hold; only integers of bounded length and names that differ are accepted."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            refuse("duplicate name in the header")
        return dict(items)

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= MAX_DIGITS else refuse(f"integer of more than {MAX_DIGITS} digits")

    def number(_: str) -> NoReturn:
        refuse("number in the header that is not an integer")

    if raw[:1] != b"{":
        refuse("header does not begin with an object")
    try:
        text = raw.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=number)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"header is not valid JSON ({type(error).__name__})") from None


def _parse_record(name: str, record: Any, data_bytes: int) -> Span:
    if not is_tensor_name(name):
        refuse("tensor name must be 1 to 512 of A-Za-z0-9_.-/ without '..'")
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        refuse("record must have dtype, shape and data_offsets and nothing else", name)
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"dtype is not one of {', '.join(DTYPES)}", name)
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        refuse(f"shape must be a list of at most {MAX_RANK} integers", name)
    if any(type(dim) is not int or not 0 <= dim < MAX_DIM for dim in shape):
        refuse("shape must hold integers from 0 to 2^31 - 1", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(at) is not int or at < 0 for at in offsets):
        refuse("data_offsets must be two integers", name)
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize or end > data_bytes:
        refuse("data_offsets do not agree with the shape or the size of the file", name)
    return dtype, tuple(shape), begin, end
