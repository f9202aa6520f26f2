"""What Triton makes of its kernels without a GPU: registers, spills, memory widths, instructions.

The default run compiles a few kernels for one architecture, `-m slow` every configuration of tests/aot_cases.py and
tests/aot_attention.py for all of them. tests/aot_baseline.json holds the registers that were seen; after a wanted change,
write it anew with `python tests/test_aot.py`.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
BASELINE = Path(__file__).with_name("aot_baseline.json")
SHARED_LIMIT = {"80": 166_912, "90": 232_448, "100": 232_448, "120": 101_376}  # bytes a block may use
RESERVED = 1024  # bytes of shared memory that the system takes of each block
TENSOR_MEMORY = 512  # columns on sm_100; Triton makes empty kernels of larger ones
ARCHS = ("80", "90", "100", "120")
FAST = pytest.param(("90", True), id="sm_90")
SLOW = [pytest.param((arch, False), id=f"sm_{arch}-all", marks=pytest.mark.slow) for arch in ARCHS]
pytestmark = pytest.mark.timeout(900)  # a minute on a free core, but cores are shared


@functools.cache
def _compiled(arch: str, fast: bool) -> dict[str, dict]:
    command = [sys.executable, ROOT / "tests/aot_compile.py", arch, *(["--fast"] if fast else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=850)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)[arch]


@pytest.fixture(scope="module", params=[FAST, *SLOW])
def compiled(request) -> tuple[str, dict[str, dict]]:
    return request.param[0], _compiled(*request.param)


def test_triton_kernels_fit_the_machine(compiled):
    arch, cases = compiled
    for case, seen in cases.items():
        spilled = max(seen["stack"], 0 if seen["allowed"]["stack"] else seen["local"])
        assert spilled <= seen["allowed"]["stack"], f"{case} on sm_{arch} spills: {seen}"
        blocks = seen["allowed"]["blocks"]
        assert blocks * seen["registers"] * seen["threads"] <= 65_536, f"{case}: {seen['registers']} registers"
        shared = blocks * seen["shared"] + (blocks - 1) * RESERVED
        assert shared <= SHARED_LIMIT[arch], f"{case} on sm_{arch}: {shared} bytes"
        assert seen["tensor_memory"] <= TENSOR_MEMORY, f"{case} on sm_{arch}: {seen['tensor_memory']} columns"
        assert seen["instructions"] > 64, f"{case} on sm_{arch} is empty"


def test_triton_kernels_use_the_instructions_that_were_meant(compiled):
    arch, cases = compiled
    for case, seen in cases.items():
        assert all(seen["opcodes"].values()), f"{case} on sm_{arch}: {seen['opcodes']}"


def test_triton_kernels_are_never_contracted_where_bits_matter(compiled):
    arch, cases = compiled
    for case, seen in cases.items():
        if case.startswith(("solver_step", "philox_normal", "conv2d")):
            assert seen["contracted"] == 0, f"{case} on sm_{arch} fuses multiply-adds: other bits than on the CPU"


def test_triton_kernels_move_sixteen_bytes_at_a_time(compiled):
    arch, cases = compiled
    for case, seen in cases.items():
        wide, least = seen["wide_loads"], seen["allowed"]["wide"]
        assert wide >= least, f"{case} on sm_{arch}: {wide} 128-bit loads, not {least}"
    assert cases["philox_normal"]["wide_stores"] == 2  # 1024 normals by 128 threads


def test_one_atomic_per_program_of_a_step_and_none_elsewhere(compiled):
    _, cases = compiled
    for case, seen in cases.items():
        assert seen["atomics"] == (1 if case.startswith("solver_step") else 0), case


def test_registers_do_not_drift(compiled):
    arch, cases = compiled
    before = json.loads(BASELINE.read_text())["triton"][arch]
    assert set(cases) <= set(before), "cases changed: run python tests/test_aot.py"
    for case, seen in cases.items():
        slack = max(0.1 * before[case], 4)
        assert abs(seen["registers"] - before[case]) <= slack, f"{case} on sm_{arch}: {before[case]} before, {seen}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_the_baseline_knows_no_other_cases(arch):
    assert set(_compiled(arch, False)) == set(json.loads(BASELINE.read_text())["triton"][arch])


if __name__ == "__main__":
    registers = {arch: {case: seen["registers"] for case, seen in _compiled(arch, False).items()} for arch in ARCHS}
    BASELINE.write_text(json.dumps({"triton": registers}, indent=2) + "\n")
