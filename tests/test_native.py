"""The compiled CPU module: equal bits everywhere, nothing past a buffer's end, and good manners in a process."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.ops import OPS, backend, native
from fastdiff.ops.solver_step import COEF, bind
from fastdiff.ops.solver_step_samples import make_call

LEVELS = ("baseline", "avx2", "avx512", "amx")
HERE = Path(__file__).parent / "native"

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


def _levels() -> tuple[str, ...]:
    return LEVELS[: LEVELS.index(native.cpu().isa_detected()) + 1]


def _script(name: str, *args, isa: str = "", timeout: int = 250, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FASTDIFF_CPU_ISA": isa, "FASTDIFF_BACKEND": "", **environment}
    command = [sys.executable, str(HERE / name), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def _digest(threads: int, isa: str) -> dict:
    done = _script("digest.py", threads, isa=isa)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["isa"] == isa
    return out["hashes"]


@pytest.fixture(scope="module")
def reference_digest() -> dict:
    return _digest(1, _levels()[-1])


# matrix products use fused multiply-add where the level has it; their integer sums have tests of their own. Activations
# that bfloat16 rounds have a shorter way on AVX512.
ACTIVATED = tuple(f"{name} bfloat16" for name in ("activate", "geglu", "group_norm", "group_norm_nchw"))
OF_LEVEL = ("linear", "conv2d", "depthwise_conv2d", "attention", *ACTIVATED)


@pytest.mark.parametrize("isa", LEVELS)
def test_every_instruction_set_gives_the_same_bits(isa, reference_digest):
    if isa not in _levels():
        pytest.skip(f"this CPU does not run {isa}")
    digest = _digest(2, isa)
    assert digest.keys() == reference_digest.keys()
    for name, value in digest.items():
        assert value == reference_digest[name] or name.startswith(OF_LEVEL), name


@pytest.mark.slow
@pytest.mark.parametrize("threads", (2, 3, 7))
def test_every_thread_count_gives_the_same_bits(threads, reference_digest):
    assert _digest(threads, _levels()[-1]) == reference_digest


def test_unknown_instruction_set_is_an_error_that_names_the_known():
    done = _script("digest.py", 1, isa="avx1024")
    assert done.returncode != 0
    assert "ValueError: FASTDIFF_CPU_ISA must be baseline, avx2, avx512 or amx, got avx1024" in done.stderr


def test_nothing_is_touched_past_a_buffer():
    done = _script("guard.py", 25)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert {"solver_step", "attention", "linear_w8a8"} <= counts.keys() and set(counts.values()) == {32}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("isa", LEVELS)
def test_nothing_is_touched_past_a_buffer_at_any_level(isa):
    if isa not in _levels():
        pytest.skip(f"this CPU does not run {isa}")
    done = _script("guard.py", 1, isa=isa, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout).values()) == {608}


def test_guard_pages_catch_a_planted_overread():
    assert _script("guard.py", "control").returncode == -signal.SIGSEGV


def test_noise_has_the_bits_of_the_reference_far_into_a_row():
    seed, index = torch.tensor([-(2**63), 7]), torch.tensor([2**31 - 1, 3], dtype=torch.int32)
    with backend("cpu"):
        got = OPS["philox_normal"](seed, index, index, 100_003)
    assert torch.equal(got, OPS["philox_normal"].reference(seed, index, index, 100_003))


def test_stores_past_the_caches_write_the_same_numbers():
    # 18 MB of state: above the size from which the kernel bypasses the caches
    args = make_call(torch.Generator().manual_seed(0), "cpu", shape=(1, 4, 1100, 1031), slots=3, copies=2)
    wanted = OPS["solver_step"].reference(*args)
    with backend("cpu"):
        OPS["solver_step"](*args)
    for got, want in zip(args[:4], wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("count", (20, pytest.param(200, marks=pytest.mark.slow)))
def test_forked_children_neither_hang_nor_differ(count):
    done = _script("fork.py", count)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0


def test_interrupt_is_answered_quickly():
    done = _script("interrupt.py", 10)
    assert done.returncode == 0, done.stderr
    # 0.1 s on a quiet machine; a call that cannot be interrupted takes longer than the median allowed here
    assert float(done.stdout.split()[0]) < 0.2


def test_denormals_survive():
    args = make_call(torch.Generator().manual_seed(0), "cpu", shape=(1, 4, 8, 8), size=1e-40)
    args[7][:, COEF.index("E")] = 0  # a constant would lift the rest
    want = OPS["solver_step"].reference(*args)[0]
    with backend("cpu"):
        OPS["solver_step"](*args)
    assert args[0].abs().max() < 1.2e-38 and args[0].count_nonzero() > 200
    assert torch.equal(args[0], want)
    assert np.float32(1e-40) * np.float32(1) != 0


def test_module_exports_its_init_function_only():
    names = subprocess.run(["nm", "-D", "--defined-only", native.cpu().__file__], capture_output=True, text=True)
    assert [line.split()[-1] for line in names.stdout.splitlines()] == ["PyInit__cpu"]


def test_no_second_thread_pool_is_loaded():
    assert native.cpu().threads_from() == "torch's OpenMP"
    needed = subprocess.run(["readelf", "-d", native.cpu().__file__], capture_output=True, text=True).stdout
    assert "NEEDED" in needed and "gomp" not in needed


@pytest.mark.slow
@pytest.mark.parametrize("stride", (2**31 - 1, 2**31, 2**31 + 7, 2**32 + 3))
@pytest.mark.parametrize("dim", (0, 1, 2))
def test_strides_beyond_31_bits(stride, dim):
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )
    length = 2 * (stride + 64)
    base = libc.mmap(None, length, 3, 0x4022, -1, 0)  # private, anonymous, no memory reserved
    assert base not in (None, ctypes.c_void_p(-1).value)
    far = torch.frombuffer((ctypes.c_ubyte * length).from_address(base), dtype=torch.float16)
    shape, strides = [2, 3, 4], [12, 4, 1]
    shape[dim], strides[dim] = 2, stride
    m = far.as_strided(shape, strides)
    m.copy_(torch.arange(1, m.numel() + 1).view(shape))
    args = list(make_call(torch.Generator().manual_seed(0), "cpu", shape=tuple(shape), outputs=1))
    args[4] = [m]
    wanted = OPS["solver_step"].reference(*args)
    with backend("cpu"):
        gram = OPS["gram"]([m, m])
        OPS["solver_step"](*args)
    assert torch.equal(args[0], wanted[0])
    assert torch.equal(gram, OPS["gram"].reference([m, m]))
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munmap(base, length)


def test_bound_step_does_what_the_op_does():
    for args in OPS["solver_step"].samples("cpu"):
        wanted = OPS["solver_step"].reference(*args)
        step = bind(*args[:4], *args[5:])
        step(args[4])
        for got, want in zip(args[:4], wanted, strict=True):
            assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def test_bound_step_runs_on_other_variants_too():
    make = lambda seed: make_call(torch.Generator().manual_seed(seed), "cpu", shape=(2, 4, 6, 6), source=True)
    args = make(0)
    with backend("reference"):
        step = bind(*args[:4], *args[5:])
    for outputs in (args[4], make(1)[4]):
        args[3].fill_(1)
        wanted = OPS["solver_step"].reference(*args[:4], outputs, *args[5:])
        step(outputs)
        assert torch.equal(args[0], wanted[0])
    with pytest.raises(TypeError, match="outputs must be floats"):
        step([m.int() for m in args[4]])


def test_bound_step_notices_other_outputs():
    make = lambda **o: make_call(torch.Generator().manual_seed(0), "cpu", shape=(2, 4, 6, 6), **o)
    args = make()
    step = bind(*args[:4], *args[5:])
    for options in ({}, {"layout": "channels_last"}, {"layout": "uneven"}, {"model": torch.float16}, {"outputs": 1}):
        args[3].fill_(1)
        outputs = make(**options)[4]
        wanted = OPS["solver_step"].reference(*args[:4], outputs, *args[5:])
        step(outputs)
        assert torch.equal(args[0], wanted[0]), options
    with pytest.raises(ValueError, match="outputs must be"):
        step([args[4][0][:, :3]])
    with pytest.raises(ValueError, match="must be on cpu"):
        step([args[4][0].to("meta")])


@pytest.mark.parametrize(
    "index, value, message",
    ((3, 2, "tick is past"), (9, 3, "rows names a row"), (8, 2, "meta names a slot"), (5, 4, "source names a row")),
)
def test_wrong_indices_are_refused_before_anything_is_written(index, value, message):
    args = make_call(torch.Generator().manual_seed(0), "cpu", shape=(2, 4, 6, 6), source=True)
    before = [t.clone() for t in args[:4]]
    args[index].fill_(value)
    if index == 3:
        before[3].fill_(value)
    with backend("cpu"), pytest.raises(IndexError, match=message):
        OPS["solver_step"](*args)
    for kept, now in zip(before, args[:4], strict=True):
        assert torch.equal(kept, now)
