"""Runs the CPU kernels on buffers that end or begin at a page nobody may touch: one byte too far is a crash."""

import ctypes
import mmap
import sys

import torch

from fastdiff.ops import OPS, native
from fastdiff.ops.solver_step_samples import make_call

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

    def empty(self, shape, dtype) -> torch.Tensor:
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
        if isinstance(value, list):
            return [self.copy(v) for v in value]
        return self.empty(value.shape, value.dtype).copy_(value) if isinstance(value, torch.Tensor) else value

    def close(self) -> None:
        for base, length in self.maps:
            _LIBC.munmap(base, length)


def philox_normal(memory: Guarded, n: int) -> None:
    rows = 1 + n % 3
    seed, step, stream = torch.arange(rows), torch.arange(rows).int(), torch.arange(rows).int()
    out = memory.empty((rows, n), torch.float32)
    inputs = [memory.copy(t) for t in (seed, step, stream)]
    native.cpu().philox_normal(out.data_ptr(), *[t.data_ptr() for t in inputs], rows, n)
    assert torch.equal(out, OPS["philox_normal"].reference(seed, step, stream, n))


def gram(memory: Guarded, n: int) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16) + ((torch.float64,) if n % 2 else ())
    operands = [torch.randn(2, n).to(dtype) for dtype in dtypes]
    truth = OPS["gram"].reference(operands)
    out = memory.empty(truth.shape, torch.float64)
    described = [(v.data_ptr(), native.TYPE_CODES[v.dtype], (n, 1, 1)) for v in memory.copy(operands)]
    native.cpu().gram(out.data_ptr(), described, 2, n, 1)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


def solver_step(memory: Guarded, n: int) -> None:
    op, types = OPS["solver_step"], tuple(native.TYPE_CODES)
    state, model = types[n % 2], types[n % 4]
    fields = ((), ("C", 1), (1, "E"))[n % 3]
    args = make_call(
        torch.Generator().manual_seed(n), "cpu", shape=(1 + n % 2, 1 + n % 3, n), state=state, model=model,
        noises=n % 3, aux=n % 2 == 0, source=n % 5 == 0, clamp=n % 4 == 0, fields=fields, slots=n % 6, outputs=n % 5,
    )  # fmt: skip
    wanted = op.reference(*args)
    guarded = [memory.copy(a) for a in args]
    next(v for v in op.variants if v.name == "cpu").run(*guarded)
    for got, want in zip(guarded[:4], wanted, strict=True):
        assert torch.equal(got, want), f"n = {n}"


KERNELS = {f.__name__: f for f in (philox_normal, gram, solver_step)}


def main(name: str, stride: int) -> None:
    cases = 0
    for n in (*range(0, 300, stride), *EDGES):
        for side in ("begin", "end"):
            memory = Guarded(side)
            KERNELS[name](memory, n)
            memory.close()
            cases += 1
    print(cases)


if __name__ == "__main__":
    if sys.argv[1] == "control":  # must die
        buffer = Guarded("end").empty((5,), torch.float32)
        print(ctypes.string_at(buffer.data_ptr(), 21))
    main(sys.argv[1], int(sys.argv[2]))
