"""Strict reader and crash-safe writer of safetensors files.

The reader checks the whole header before it allocates anything, then reads and copies. It never maps the file (a
file that shrinks under a mapping kills the process) and never reads pickles.
"""

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from .atomic import write_atomic
from .header import (
    DTYPE_NAMES,
    DTYPES,
    MAX_HEADER,
    CheckpointError,
    Span,
    is_tensor_name,
    parse_header,
    parse_json,
    refuse,
)
from .quant_record import check_quant_values

Tensor = torch.Tensor

HASHES = "fastdiff.sha256"
_PICKLE_OR_ZIP = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


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
        check_quant_values(tensors, metadata, refuse)
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


def _read_header(file: BinaryIO) -> tuple[dict[str, Span], dict[str, str], int]:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        refuse("not a regular file")
    first = file.read(8)
    if len(first) < 8:
        refuse("too short for a safetensors file")
    (length,) = struct.unpack("<Q", first)
    fits = length <= min(MAX_HEADER, status.st_size - 8)
    raw = file.read(length) if fits else b""
    # a sound header may be as long as these bytes say (640 is 80 02), hence not on the first bytes alone
    if first.startswith(_PICKLE_OR_ZIP) and raw[:1] != b"{":
        refuse("pickle or zip is refused because it can run code; convert it to safetensors where you trust it")
    if not fits:
        refuse(f"header length is larger than the file or than {MAX_HEADER} bytes")
    if len(raw) != length:
        refuse("truncated header")
    spans, metadata = parse_header(raw, status.st_size - 8 - length)
    return spans, metadata, 8 + length


def _read_tensor(file: BinaryIO, begin: int, name: str, span: Span) -> Tensor:
    dtype, shape, first, end = span
    flat = torch.empty(end - first, dtype=torch.uint8)
    view = memoryview(flat.numpy())
    at = begin + first
    while view.nbytes:
        count = os.preadv(file.fileno(), [view], at)
        if count == 0:
            refuse("truncated data", name)
        view, at = view[count:], at + count
    return flat.view(DTYPES[dtype]).reshape(shape)


def _check_hashes(tensors: dict[str, Tensor], stored: str) -> None:
    hashes = parse_json(stored.encode("utf-8", "surrogatepass"))
    if set(hashes) != set(tensors):
        refuse("sha256 list does not name the tensors of the file")
    for name, tensor in tensors.items():
        if hashes[name] != hashlib.sha256(_bytes_of(tensor)).hexdigest():
            refuse("data does not match its sha256", name)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
