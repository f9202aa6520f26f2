"""GGUF blocks as tensors: exact decoding, and Q8_0 and Q4_0 without loss as codes of our own layout."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch

from fastdiff.quant.qtensor import QTensor
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

MAX_TENSORS, MAX_KEYS, MAX_STRING = 65536, 65536, 1 << 20
_MAGIC = b"GGUF"
# metadata value types: struct format of the numbers; 8 is a string, 9 an array
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class BlockType:
    """A way to store a row: `elements` numbers in `size` bytes; decode maps [R, size] uint8 to [R, elements] float32."""

    name: str
    elements: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


def _half(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """The low halves of the bytes, then the high ones."""
    return np.concatenate((raw & 15, raw >> 4), axis=-1)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:]).astype(np.float32) - 8)


def _sub_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and eight 6-bit minima out of 12 bytes."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate((low & 63, (high & 15) | ((low >> 6) << 4)), axis=1)
    minima = np.concatenate((middle & 63, (high >> 4) | ((middle >> 6) << 4)), axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_quant(raw: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """d * scale * code - dmin * min for eight sub-blocks of 32 codes."""
    scales, minima = _sub_scales(raw[:, 4:16])
    d, dmin = _half(raw[:, :2]), _half(raw[:, 2:4])
    return ((d * scales)[..., None] * codes - (dmin * minima)[..., None]).reshape(len(raw), 256)


def _q4_k(raw: np.ndarray) -> np.ndarray:
    return _k_quant(raw, _nibbles(raw[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32))


def _q5_k(raw: np.ndarray) -> np.ndarray:
    low = _nibbles(raw[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    bit = (raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _k_quant(raw, (low | (bit << 4)).astype(np.float32))


def _q6_k(raw: np.ndarray) -> np.ndarray:
    low = raw[:, :128].reshape(-1, 2, 2, 32)  # two halves of 128 codes
    low = np.concatenate((low & 15, low >> 4), axis=2)  # [R, 2, 4, 32]
    high = (raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & 3
    codes = (low | (high << 4)).astype(np.float32) - 32
    scales = raw[:, 192:208].view(np.int8).astype(np.float32).reshape(-1, 2, 4, 2, 1)
    values = codes.reshape(-1, 2, 4, 2, 16) * scales
    return (values.reshape(-1, 256) * _half(raw[:, 208:])).reshape(len(raw), 256)


BLOCKS = {
    0: BlockType("F32", 1, 4, lambda raw: np.ascontiguousarray(raw).view(np.float32)),
    1: BlockType("F16", 1, 2, _half),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
}


def decode(raw: np.ndarray, kind: BlockType) -> np.ndarray:
    """Blocks [R, size] uint8 as float32 [R, elements]."""
    return kind.decode(np.ascontiguousarray(raw))


def to_qtensor(raw: np.ndarray, kind: BlockType, shape: tuple[int, int]) -> QTensor:
    """Q8_0 or Q4_0 blocks of a matrix [N, K] as codes and scales of groups of 32: the same numbers, exactly."""
    N, K = shape
    if kind.name == "Q8_0":
        codes, spec = raw[:, 2:].view(np.int8), TensorSpec("int8", "group", 32)
    elif kind.name == "Q4_0":
        codes = (_nibbles(raw[:, 2:]).astype(np.int16) - 8).astype(np.int8)
        spec = TensorSpec("int4", "group", 32, range="signed")
    else:
        raise ValueError(f"gguf: {kind.name} has no integer grid with one scale per group; decode it instead")
    if (codes == -128).any():
        raise ValueError("gguf: the code -128 has no place in a symmetric grid; decode the blocks and quantize again")
    codes = torch.from_numpy(np.ascontiguousarray(codes)).view(N, K)
    scale = torch.from_numpy(_half(raw[:, :2])[:, 0].copy()).view(N, K // 32)
    empty = scale == 0  # a block of zeros: any scale will do, but not zero
    codes = codes.masked_fill(empty.repeat_interleave(32, 1), 0)
    return QTensor(codes, scale.masked_fill(empty, 1.0), None, spec)


def read_gguf(file: BinaryIO, size: int) -> dict[str, tuple[BlockType, tuple[int, ...], np.ndarray]]:
    """Name -> block type, shape (rows last in the file's order reversed: [N, K]) and blocks [R, size] uint8.

    file  unbuffered or not, at its start;  size  of the whole file in bytes

    Nothing is allocated before its bytes are known to be in the file. Raises ValueError for anything irregular.
    """
    reader = _Reader(file, size)
    if reader.take(4) != _MAGIC or reader.number("I") not in (2, 3):
        raise ValueError("gguf: not a GGUF file of version 2 or 3")
    tensors, keys = reader.number("Q"), reader.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise ValueError(f"gguf: more than {MAX_TENSORS} tensors or {MAX_KEYS} keys")
    metadata = {}
    for _ in range(keys):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    records = [reader.tensor() for _ in range(tensors)]
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or not 1 <= align <= 1 << 20:
        raise ValueError(f"gguf: alignment must be from 1 to 2^20, got {align!r}")
    begin = -(-reader.at // align) * align
    return {name: (kind, shape, reader.blocks(begin + at, kind, shape)) for name, kind, shape, at in records}


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError("gguf: the file is cut short")
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("gguf: the file is cut short")
        self.at += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.number("Q")
        if length > MAX_STRING:
            raise ValueError(f"gguf: a string of more than {MAX_STRING} bytes")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == 8:
            return self.string()
        if kind != 9 or nested:
            raise ValueError(
                f"gguf: metadata of type {kind} inside an array" if nested else f"gguf: metadata of type {kind}"
            )
        inner, count = self.number("I"), self.number("Q")
        if count > self.size:
            raise ValueError("gguf: an array longer than the file")
        return [self.value(inner, nested=True) for _ in range(count)]

    def tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        name, rank = self.string(), self.number("I")
        if rank > 4:
            raise ValueError(f"gguf: {name}: rank must be at most 4, got {rank}")
        shape = tuple(self.number("Q") for _ in range(rank))[::-1]
        kind, at = self.number("I"), self.number("Q")
        if kind not in BLOCKS:
            known = ", ".join(block.name for block in BLOCKS.values())
            raise ValueError(f"gguf: {name}: type {kind} is not supported, only {known}")
        return name, BLOCKS[kind], shape, at

    def blocks(self, begin: int, kind: BlockType, shape: tuple[int, ...]) -> np.ndarray:
        count = math.prod(shape)
        if (shape and shape[-1] % kind.elements) or count // kind.elements * kind.size > self.size - begin:
            raise ValueError(f"gguf: a tensor {list(shape)} of {kind.name} does not fit its blocks or the file")
        self.file.seek(begin)
        raw = self.file.read(count // kind.elements * kind.size)
        if len(raw) != count // kind.elements * kind.size:
            raise ValueError("gguf: the file is cut short")
        return np.frombuffer(raw, dtype=np.uint8).reshape(-1, kind.size)
