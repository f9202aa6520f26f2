"""Strict reader and crash-safe writer of safetensors files.

The reader checks the whole header before it allocates anything, then reads and copies. It never maps the file (a
file that shrinks under a mapping kills the process) and never reads pickles.
"""

import hashlib
import json
import math
import os
import re
import secrets
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from .quant_record import check_quant_layout, check_quant_values

Tensor = torch.Tensor
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
HASHES = "fastdiff.sha256"
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,512}\Z")
_PICKLE_OR_ZIP = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class CheckpointError(ValueError):
    """A file that cannot be trusted; the message names the file, the tensor and the reason."""

    def __init__(self, reason: str, tensor: str | None = None, file: str | os.PathLike | None = None) -> None:
        super().__init__(reason, tensor, file)
        self.reason, self.tensor, self.file = reason, tensor, file

    def __str__(self) -> str:
        tensor = None if self.tensor is None else f"tensor {self.tensor}"
        return ": ".join(str(part) for part in (self.file, tensor, self.reason) if part is not None)


def load_checkpoint(path: str | os.PathLike, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file into tensors of its own memory and its metadata.

    Raises CheckpointError for anything irregular. `verify` compares the sha256 that `save_checkpoint` stored.
    """
    # not blocking: a FIFO must be refused, not waited for
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        return read_checkpoint(file, path, verify)


def read_checkpoint(
    file: BinaryIO, name: str | os.PathLike, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`load_checkpoint` from an unbuffered file at its start; `name` is what errors call it."""
    try:
        spans, metadata, begin = _read_header(file)
        tensors = {key: _read_tensor(file, begin, key, span) for key, span in spans.items()}
        hashes = metadata.pop(HASHES, None)
        if verify and hashes is not None:
            _check_hashes(tensors, hashes)
        check_quant_values(tensors, metadata, _refuse)
    except CheckpointError as error:
        raise CheckpointError(error.reason, error.tensor, name) from None
    return tensors, metadata


def save_checkpoint(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that a crash at any point leaves the whole old or the whole new file.

    The sha256 of every tensor goes into the metadata. OSError (disk full, read-only folder) leaves the old file.
    """
    for key, tensor in tensors.items():
        if not is_tensor_name(key):
            raise CheckpointError("tensor name must be 1 to 512 of A-Za-z0-9_.-/ without '..'", file=path)
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"dtype {tensor.dtype} is not supported", key, path)
    # widest dtype first keeps every tensor aligned
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    blobs = {key: _bytes_of(tensors[key]) for key in order}
    hashes = {key: hashlib.sha256(blob).hexdigest() for key, blob in blobs.items()}
    header: dict[str, Any] = {"__metadata__": {**metadata, HASHES: json.dumps(hashes)}}
    at = 0
    for key, blob in blobs.items():
        tensor = tensors[key]
        span = [at, at + blob.nbytes]
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    try:
        parse_header(raw, at)
    except CheckpointError as error:
        raise CheckpointError(error.reason, error.tensor, path) from None
    write_atomic(path, [struct.pack("<Q", len(raw)) + raw, *blobs.values()])


def write_atomic(path: str | os.PathLike, chunks: list[bytes | memoryview]) -> None:
    """Write the chunks to a temporary file in the same folder, sync it, rename it to `path`, sync the folder."""
    path = Path(path).absolute()
    temp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view.nbytes:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def parse_header(raw: bytes, data_bytes: int) -> tuple[dict[str, Span], dict[str, str]]:
    """Check the JSON header against the number of data bytes; return the spans by name and the metadata."""
    header = _parse_json(raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        _refuse("metadata must map strings to strings")
    if len(header) > MAX_TENSORS:
        _refuse(f"more than {MAX_TENSORS} tensors")
    spans = {name: _parse_record(name, record, data_bytes) for name, record in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != at:
            _refuse("gap or overlap before its data", name)
        at = end
    if at != data_bytes:
        _refuse("bytes left over after the last tensor")
    check_quant_layout({name: span[:2] for name, span in spans.items()}, metadata, _refuse)
    return spans, metadata


def is_tensor_name(name: str) -> bool:
    return bool(_NAME.match(name)) and ".." not in name and not name.startswith("/")


def _refuse(reason: str, tensor: str | None = None) -> NoReturn:
    raise CheckpointError(reason, tensor)


def _read_header(file: BinaryIO) -> tuple[dict[str, Span], dict[str, str], int]:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        _refuse("not a regular file")
    first = file.read(8)
    if first.startswith(_PICKLE_OR_ZIP):
        _refuse("pickle or zip is refused because it can run code; convert it to safetensors where you trust it")
    if len(first) < 8:
        _refuse("too short for a safetensors file")
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER or length > status.st_size - 8:
        _refuse(f"header length is larger than the file or than {MAX_HEADER} bytes")
    raw = file.read(length)
    if len(raw) != length:
        _refuse("truncated header")
    spans, metadata = parse_header(raw, status.st_size - 8 - length)
    return spans, metadata, 8 + length


def _parse_json(raw: bytes) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            _refuse("duplicate name in the header")
        return dict(items)

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= MAX_DIGITS else _refuse(f"integer of more than {MAX_DIGITS} digits")

    def number(_: str) -> NoReturn:
        _refuse("number in the header that is not an integer")

    if raw[:1] != b"{":
        _refuse("header does not begin with an object")
    try:
        text = raw.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=number)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"header is not valid JSON ({type(error).__name__})") from None


def _parse_record(name: str, record: Any, data_bytes: int) -> Span:
    if not is_tensor_name(name):
        _refuse("tensor name must be 1 to 512 of A-Za-z0-9_.-/ without '..'")
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        _refuse("record must have dtype, shape and data_offsets and nothing else", name)
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(f"dtype is not one of {', '.join(DTYPES)}", name)
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        _refuse(f"shape must be a list of at most {MAX_RANK} integers", name)
    if any(type(dim) is not int or not 0 <= dim < MAX_DIM for dim in shape):
        _refuse("shape must hold integers from 0 to 2^31 - 1", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(at) is not int or at < 0 for at in offsets):
        _refuse("data_offsets must be two integers", name)
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize or end > data_bytes:
        _refuse("data_offsets do not agree with the shape or the size of the file", name)
    return dtype, tuple(shape), begin, end


def _read_tensor(file: BinaryIO, begin: int, name: str, span: Span) -> Tensor:
    dtype, shape, first, end = span
    flat = torch.empty(end - first, dtype=torch.uint8)
    view = memoryview(flat.numpy())
    at = begin + first
    while view.nbytes:
        count = os.preadv(file.fileno(), [view], at)
        if count == 0:
            _refuse("truncated data", name)
        view, at = view[count:], at + count
    return flat.view(DTYPES[dtype]).reshape(shape)


def _check_hashes(tensors: dict[str, Tensor], stored: str) -> None:
    hashes = _parse_json(stored.encode())
    if set(hashes) != set(tensors):
        _refuse("sha256 list does not name the tensors of the file")
    for name, tensor in tensors.items():
        if hashes[name] != hashlib.sha256(_bytes_of(tensor)).hexdigest():
            _refuse("data does not match its sha256", name)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
