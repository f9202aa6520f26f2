"""Checkpoints: what is written is read, what is wrong is refused, a crash leaves no torn file."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_fuzz
import pytest
import torch
from checkpoint_attacks import ATTACKS, ONES, QUANT_RECORD, packed, quantized, quantized_good, record

from fastdiff.models.atomic import write_atomic
from fastdiff.models.checkpoint import load_checkpoint, save_checkpoint
from fastdiff.models.header import DTYPE_NAMES, CheckpointError


def refused(path: Path, blob: bytes) -> str:
    path.write_bytes(blob)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    return str(error.value)


@pytest.mark.parametrize("name", ATTACKS)
def test_refuses_attack_fast_and_small(tmp_path, name):
    path = tmp_path / "m.safetensors"
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    message = refused(path, ATTACKS[name])
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kilobytes
    assert str(path) in message and len(message) < 1000


def test_attacks_are_at_least_the_48_of_the_specification():
    assert len(ATTACKS) >= 48


def test_accepts_what_the_attacks_distort(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(quantized_good())
    tensors, metadata = load_checkpoint(path)
    assert json.loads(metadata["fastdiff.quant"]) == {"l": QUANT_RECORD}
    assert tensors["l.weight"].tolist() == [[0] * 16] * 2 and tensors["l.weight_scale"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("zero", [0, 15, 16])
def test_zero_points_must_fit_the_bits(tmp_path, zero):
    path = tmp_path / "m.safetensors"
    layer = {"dtype": "uint4", "bits": 4, "group": 16, "in_features": 32, "sym": False}
    zeros = torch.full((2, 2), zero, dtype=torch.uint8)
    tensors = {"l.weight": torch.zeros(2, 16).byte(), "l.weight_scale": torch.ones(2, 2), "l.weight_zero": zeros}
    save_checkpoint(path, tensors, {"fastdiff.quant": json.dumps({"l": layer})})
    if zero < 16:
        assert load_checkpoint(path)[0]["l.weight_zero"].tolist() == zeros.tolist()
    else:
        assert "zero points" in refused(path, path.read_bytes())


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x4B50, 0x14B50])
def test_header_lengths_that_look_like_pickle_or_zip_are_read(tmp_path, length):
    raw = json.dumps({"a": record([2], [0, 8])}).encode().ljust(length)
    (tmp_path / "m.safetensors").write_bytes(packed(None, ONES, raw=raw))
    assert load_checkpoint(tmp_path / "m.safetensors")[0]["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "hashes", ["", "[]", "{", '{"b": 1}', '{"a": 1}', '{"a": [1]}', "\ud800", '{"a": "\ud800"}', "[" * 10**5]
)
def test_broken_hash_lists_are_refused(tmp_path, hashes):
    header = {"__metadata__": {"fastdiff.sha256": hashes}, "a": record([2], [0, 8])}
    refused(tmp_path / "m.safetensors", packed(header, ONES))


def test_errors_show_hostile_names_shortened(tmp_path):
    for name in ("x" * 5000, "a\x1b[2Jb"):
        header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        message = refused(tmp_path / "m.safetensors", packed(header, ONES))
        assert len(message) < 400 and message.isprintable()


def test_long_integers_are_refused_before_they_are_converted(tmp_path):
    assert "19 digits" in refused(tmp_path / "m.safetensors", ATTACKS["4000-digit integer"])


def test_random_quant_records_are_refused_or_agree_with_the_tensors(tmp_path):
    path, accepted = tmp_path / "m.safetensors", 0
    for seed in range(200):
        draw = random.Random(seed)
        layer = dict(QUANT_RECORD)
        for key in draw.sample(sorted(layer), draw.randint(0, 2)):
            layer[key] = draw.choice([0, 1, 4, 8, 16, 32, 1 << 40, -16, True, False, None, 1.5, "8", [], {}])
        path.write_bytes(quantized(layer, record([2], [32, 40])))
        try:
            load_checkpoint(path)
        except CheckpointError:
            continue
        accepted += 1
        assert layer == QUANT_RECORD
    assert accepted > 10


def test_pickles_are_refused_with_a_hint(tmp_path):
    for protocol in range(2, 6):
        assert "convert" in refused(tmp_path / "m.bin", pickle.dumps({"a": 1}, protocol))
    torch.save({"a": torch.ones(2)}, tmp_path / "real.pt")
    assert "convert" in refused(tmp_path / "m.pt", (tmp_path / "real.pt").read_bytes())


def test_every_truncation_is_refused(tmp_path):
    blob = quantized_good()
    for length in range(len(blob)):
        refused(tmp_path / "m.safetensors", blob[:length])


def flip_bytes(tmp_path: Path, seeds: range) -> None:
    good = quantized_good()
    path = tmp_path / "m.safetensors"
    for seed in seeds:
        draw, blob = random.Random(seed), bytearray(good)
        for _ in range(draw.randint(1, 8)):
            blob[draw.randrange(len(blob))] = draw.randrange(256)
        path.write_bytes(blob)
        try:
            tensors, _ = load_checkpoint(path)
        except CheckpointError:
            continue
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(blob)


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    flip_bytes(tmp_path, range(200))


@pytest.mark.slow
def test_many_flipped_bytes_are_refused_or_harmless(tmp_path):
    flip_bytes(tmp_path, range(200, 2200))


def test_T50_mutated_files_are_refused_or_sound():
    """FASTDIFF_FUZZ sets the number of files; `checkpoint_fuzz.py` as a program runs a million."""
    count = int(os.environ.get("FASTDIFF_FUZZ", 2000))
    found = checkpoint_fuzz.run(count)
    accepted = found["read"] + found["read and run"]
    assert found.total() == count and 0.01 * count < accepted < 0.1 * count and len(found) > 25


def test_flipped_data_of_our_own_files_is_reported(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"layer.weight": torch.arange(64.0)}, {})
    blob = bytearray(path.read_bytes())
    for seed in range(50):
        changed = bytearray(blob)
        changed[-1 - random.Random(seed).randrange(256)] ^= 1 << seed % 8
        assert "layer.weight" in refused(path, changed)
    path.write_bytes(changed)
    assert load_checkpoint(path, verify=False)[0]["layer.weight"].shape == (64,)


def test_not_regular_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="regular"):
        load_checkpoint(tmp_path / "fifo")
    with pytest.raises(OSError):
        load_checkpoint(tmp_path)


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"empty": torch.zeros(3, 0, 2), "scalar": torch.tensor(3.5), "odd": torch.arange(7, dtype=torch.uint8)}
    for dtype in DTYPE_NAMES:
        tensors[f"a.{DTYPE_NAMES[dtype]}"] = (torch.randn(3, 5, generator=generator) * 9).to(dtype)
    tensors["strided"] = torch.randn(6, 8, generator=generator)[::2, 1::3].T
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def test_round_trip_and_the_reference_reader_agree(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, samples(), {"format": "pt"})
    tensors, metadata = load_checkpoint(path)
    assert metadata == {"format": "pt"}
    safetensors = pytest.importorskip("safetensors.torch", reason="the reference reader is not installed")
    for read in (tensors, safetensors.load_file(path)):
        assert set(read) == set(samples())
        for name, tensor in samples().items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape and same(read[name], tensor)


def test_reads_what_the_reference_writer_writes(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the reference writer is not installed")
    contiguous = {name: tensor.contiguous() for name, tensor in samples().items()}
    safetensors.save_file(contiguous, tmp_path / "m.safetensors")
    tensors, _ = load_checkpoint(tmp_path / "m.safetensors")
    assert all(same(tensors[name], tensor) for name, tensor in contiguous.items())


def test_loaded_tensors_survive_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, {"a": torch.arange(100000.0)}, {})
    tensors, _ = load_checkpoint(path)
    os.truncate(path, 100)
    assert torch.equal(tensors["a"], torch.arange(100000.0))


@pytest.mark.parametrize("name", ["../x", "/x", "", "a b", "a\0", "x" * 513])
def test_writer_refuses_names(tmp_path, name):
    with pytest.raises(CheckpointError, match="name"):
        save_checkpoint(tmp_path / "m.safetensors", {name: torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_writer_refuses_dtypes_and_ranks(tmp_path):
    for tensor in (torch.ones(1, dtype=torch.complex64), torch.ones([1] * 9)):
        with pytest.raises(CheckpointError, match="tensor a"):
            save_checkpoint(tmp_path / "m.safetensors", {"a": tensor}, {})
    assert not list(tmp_path.iterdir())


OLD, NEW = b"o" * 100_000, b"n" * 150_000


class Crash(BaseException):
    """Stands for the death of the process: nothing of ours may run after it."""


def break_call(monkeypatch: pytest.MonkeyPatch, name: str, at: int, fault: str) -> None:
    real: Callable = getattr(os, name)
    calls = []

    def faulty(*args, **kwargs):
        calls.append(name)
        if len(calls) != at:
            return real(*args, **kwargs)
        if fault == "short":
            real(args[0], memoryview(args[1])[: len(args[1]) // 2])
        raise OSError(getattr(errno, fault), fault) if fault.startswith("E") else Crash(fault)

    monkeypatch.setattr(os, name, faulty)
    if not fault.startswith("E"):
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)


CALLS = [
    ("open", 1),
    ("write", 1),
    ("fchmod", 1),
    ("fsync", 1),
    ("close", 1),
    ("replace", 1),
    ("open", 2),
    ("fsync", 2),
]


@pytest.mark.parametrize("fault", ["die", "short", "ENOSPC", "EIO", "EDQUOT"])
@pytest.mark.parametrize(("call", "at"), CALLS)
def test_fault_at_every_call_leaves_old_or_new(tmp_path, monkeypatch, call, at, fault):
    if fault == "short" and call != "write":
        fault = "die"
    path = tmp_path / "m.bin"
    path.write_bytes(OLD)
    with monkeypatch.context() as patch:
        break_call(patch, call, at, fault)
        with pytest.raises((OSError, Crash)):
            write_atomic(path, [NEW])
    renamed = (call, at) in (("open", 2), ("fsync", 2))
    assert path.read_bytes() == (NEW if renamed else OLD)
    if fault.startswith("E"):
        assert [file.name for file in tmp_path.iterdir()] == ["m.bin"]


def test_partial_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[:997]))
    write_atomic(tmp_path / "m.bin", [NEW[:5], NEW[5:]])
    assert (tmp_path / "m.bin").read_bytes() == NEW


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static long count;
/* 0: go on, 1: fail with errno, 2: die (the caller may first do half of the work) */
static int fault(void) {
  const char *at = getenv("FAULT_AT"), *kind = getenv("FAULT_KIND");
  if (!at || ++count != atol(at)) return 0;
  if (!strcmp(kind, "short")) return 2;
  if (!strcmp(kind, "die")) _exit(9);
  errno = atoi(kind);
  return 1;
}
static int watched[1024];
static int opened(const char *symbol, const char *path, int flags, mode_t mode) {
  int ours = strstr(path, getenv("FAULT_DIR")) != NULL;
  if (ours && (flags & O_CREAT)) { int f = fault(); if (f == 1) return -1; if (f == 2) _exit(9); }
  int fd = ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, symbol))(path, flags, mode);
  if (fd >= 0 && fd < 1024) watched[fd] = ours;
  return fd;
}
int open(const char *p, int f, ...) { va_list v; va_start(v, f); mode_t m = va_arg(v, mode_t); va_end(v); return opened("open", p, f, m); }
int open64(const char *p, int f, ...) { va_list v; va_start(v, f); mode_t m = va_arg(v, mode_t); va_end(v); return opened("open64", p, f, m); }
ssize_t write(int fd, const void *data, size_t size) {
  ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
  if (fd >= 0 && fd < 1024 && watched[fd]) { int f = fault(); if (f == 1) return -1; if (f == 2) { real(fd, data, size / 2); _exit(9); } }
  return real(fd, data, size);
}
int fsync(int fd) {
  if (fd >= 0 && fd < 1024 && watched[fd]) { int f = fault(); if (f == 1) return -1; if (f == 2) _exit(9); }
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int rename(const char *a, const char *b) {
  int f = fault(); if (f == 1) return -1; if (f == 2) _exit(9);
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(a, b);
}
"""
# loads the writer alone: importing torch a hundred times would take minutes
CHILD = """
import os, secrets, sys
from pathlib import Path
exec(sys.argv[2])
{writer}(sys.argv[1], [b"n" * 150000])
"""


def sweep(tmp_path: Path, shim: Path, writer: str, source: str) -> tuple[int, int, int, int]:
    """Break each system call in five ways; return cases, torn files, false successes, files left behind."""
    folder = tmp_path / f"sweep_{writer}"
    folder.mkdir()
    path, cases, torn, false, litter = folder / "m.bin", 0, 0, 0, 0
    for at in range(1, 100):
        for kind in ("die", "short", str(errno.ENOSPC), str(errno.EIO), str(errno.EDQUOT)):
            path.write_bytes(OLD)
            fault = {"LD_PRELOAD": str(shim), "FAULT_DIR": str(folder), "FAULT_AT": str(at), "FAULT_KIND": kind}
            command = [sys.executable, "-I", "-S", "-c", CHILD.format(writer=writer), str(path), source]
            code = subprocess.run(command, env=fault, stderr=subprocess.DEVNULL, check=False).returncode
            got = path.read_bytes()
            if code == 0 and got == NEW:
                return cases, torn, false, litter
            cases += 1
            torn += got not in (OLD, NEW)
            false += code == 0
            left = [file for file in folder.iterdir() if file != path]
            litter += bool(left) and kind.isdigit()
            for file in left:
                file.unlink()
    raise AssertionError("the writer never got past the faults")


@pytest.mark.slow
def test_faults_below_python_tear_only_the_naive_writer(tmp_path):
    import inspect

    if shutil.which("gcc") is None:
        pytest.skip("no C compiler to build the faulty system calls with")
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", tmp_path / "shim.c", "-o", shim, "-ldl"], check=True)
    cases, torn, false, litter = sweep(tmp_path, shim, "write_atomic", inspect.getsource(write_atomic))
    assert cases >= 25 and (torn, false, litter) == (0, 0, 0)
    naive = "def naive(path, chunks):\n    with open(path, 'wb') as file:\n        file.write(chunks[0])\n"
    assert sweep(tmp_path, shim, "naive", naive)[1] > 0
