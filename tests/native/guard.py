"""Runs the CPU kernels on buffers that end or begin at a page nobody may touch: one byte too far is a crash.

Arguments: a step between sizes, then names of ops (default: all). Prints the number of calls per op.
"""

import copy
import ctypes
import json
import mmap
import sys

import torch
from random_calls import CALLS, Draw

from fastdiff.ops import OPS, backend, memory

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE, READ_WRITE, PRIVATE_ANONYMOUS = mmap.PAGESIZE, 3, 0x22
EDGES = (4095, 4096, 4097, 8191)


class Guarded:
    """Makes tensors whose memory is followed ("end") or preceded ("begin") by an inaccessible page."""

    def __init__(self, side: str):
        self.side, self.maps = side, []

    def empty(self, shape, dtype, device="cpu") -> torch.Tensor:
        size = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        pages = -(-size // PAGE)
        length = (pages + 2) * PAGE
        base = _LIBC.mmap(None, length, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        _LIBC.mprotect(base, PAGE, 0)
        _LIBC.mprotect(base + (pages + 1) * PAGE, PAGE, 0)
        self.maps.append((base, length))
        start = base + PAGE if self.side == "begin" else base + (pages + 1) * PAGE - size
        return torch.frombuffer((ctypes.c_ubyte * size).from_address(start), dtype=dtype).view(shape)

    def copy(self, value):
        """The same value, for a tensor with the same strides, in memory that holds nothing else."""
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return [self.copy(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.numel() == 0:
            return value.clone()
        own = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
        extent = 1 + sum((n - 1) * step for n, step in zip(own.shape, own.stride(), strict=True))
        return self.empty((extent,), value.dtype).as_strided(own.shape, own.stride()).copy_(own).expand(value.shape)

    def close(self) -> None:
        for base, length in self.maps:
            _LIBC.munmap(base, length)


def results(op, args: list) -> list[torch.Tensor]:
    """What an op returns, or the arguments that it changed."""
    out = op(*args)
    if op.mutates:
        return [args[i] for i in op._mutated]
    return list(out) if isinstance(out, (list, tuple)) else [out]


def check(name: str, n: int) -> int:
    """One random call of innermost size n on both sides; the same bits as on ordinary memory."""
    args = CALLS[name](Draw.seeded(n), n)
    wanted = results(OPS[name], copy.deepcopy(args))
    for side in ("begin", "end"):
        guarded = Guarded(side)
        memory.empty = guarded.empty
        try:
            got = results(OPS[name], [guarded.copy(a) for a in args])
        finally:
            memory.empty = ordinary
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)), f"{name}, n = {n}, {side}"
        del got
        guarded.close()
    return 2


ordinary = memory.empty


def main(stride: int, names: list[str]) -> None:
    with backend("cpu"):
        counts = {name: sum(check(name, n) for n in (*range(0, 300, stride), *EDGES)) for name in names or CALLS}
    print(json.dumps(counts))


if __name__ == "__main__":
    if sys.argv[1] == "control":  # must die
        buffer = Guarded("end").empty((5,), torch.float32)
        print(ctypes.string_at(buffer.data_ptr(), 21))
    main(int(sys.argv[1]), sys.argv[2:])
