"""The CPU kernels under AddressSanitizer and UBSan, in a build of their own that must first catch planted faults."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitized"
SCRIPTS = ROOT / "tests" / "native"
FAULTS = ("heap_overread", "use_after_free", "integer_overflow", "shift", "misaligned")
ASAN_EXIT, UBSAN_EXIT = 99, 98

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def sanitized() -> dict:
    """The environment in which Python imports a sanitized copy of the package."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    flags = {"FASTDIFF_SANITIZE": "address,undefined,float-cast-overflow", "FASTDIFF_CUDA": "0"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(BUILD),
        "--build-lib",
        str(BUILD / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True, stdout=subprocess.DEVNULL)
    library = lambda name: os.path.realpath(
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
    )
    return {
        **os.environ,
        "PYTHONPATH": str(BUILD / "lib"),
        # the sanitizer first, then libstdc++, so that it finds the real functions it wraps
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1:exitcode={ASAN_EXIT}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:exitcode={UBSAN_EXIT}",
        "FASTDIFF_BACKEND": "",
    }


def _run(environment: dict, script: str, *args, isa: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *args]
    environment = {**environment, "FASTDIFF_CPU_ISA": isa}
    return subprocess.run(command, env=environment, cwd=BUILD, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(sanitized, fault):
    done = _run(sanitized, "asan.py", fault)
    assert done.returncode in (ASAN_EXIT, UBSAN_EXIT), done.stderr[-2000:]


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
def test_every_call_is_clean(sanitized, isa):
    done = _run(sanitized, "asan.py", "none", isa=isa)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) >= 2000  # samples and 50 random calls of every op


def test_instruction_sets_do_not_leak(sanitized):
    """Whatever a level defines for others to use must carry its name: an inline function of a header, compiled with
    AVX512, could be the copy that the linker keeps for every CPU."""
    objects = [o for o in ROOT.glob("build/_cpu-*address*/*.*.o") if o.stem.partition(".")[2] in ("avx2", "avx512")]
    assert len(objects) >= 6
    for file in objects:
        level = file.stem.partition(".")[2]
        symbols = subprocess.check_output(["nm", "-C", "--defined-only", str(file)], text=True).splitlines()
        shared = [line for line in symbols if line.split(maxsplit=2)[1] in "WVuT" and "DW.ref" not in line]
        assert shared and all(f"::{level}::" in line for line in shared), [
            s for s in shared if f"::{level}::" not in s
        ]
