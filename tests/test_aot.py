"""What Triton makes of its kernels without a GPU: registers, spills, memory widths, contraction.

The default run compiles for one architecture, `-m slow` for all of them. tests/aot_baseline.json holds the registers that
were seen; after a wanted change, write it anew with `python tests/test_aot.py`.
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
# 128-bit loads of a guided step on contiguous tensors: one 1024-element block is two words a thread of float32 (x, history)
# and one of bfloat16, per operand
WIDE_LOADS = {
    "solver_step: guided bf16, 2 slots": 2 + 2 * 1 + 2 * 2,
    "solver_step: guided fp32, 3 slots": 2 + 2 * 2 + 3 * 2,
    "solver_step: everything, fp32": 2 + 4 * 2 + 5 * 2 + 2 * 2,
    "gram: 2 fp32": 2,
    "gram: 8 fp32": 8,
}
FAST = pytest.param("90", id="sm_90")
SLOW = [pytest.param(arch, id=f"sm_{arch}", marks=pytest.mark.slow) for arch in ("80", "100", "120")]


@functools.cache
def _compiled(*archs: str) -> dict[str, dict[str, dict]]:
    command = [sys.executable, ROOT / "tests/aot_compile.py", *archs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=[FAST, *SLOW])
def compiled(request) -> tuple[str, dict[str, dict]]:
    return request.param, _compiled(request.param)[request.param]


def test_triton_kernels_fit_the_machine(compiled):
    arch, cases = compiled
    for case, seen in cases.items():
        assert seen["stack"] == 0 and seen["local"] == 0, f"{case} on sm_{arch} spills: {seen}"
        assert seen["registers"] * seen["threads"] <= 65_536, case
        assert seen["shared"] <= SHARED_LIMIT[arch], case
        assert seen["instructions"] > 64, f"{case} on sm_{arch} is empty"


def test_triton_kernels_are_never_contracted_where_bits_matter(compiled):
    arch, cases = compiled
    for case, seen in cases.items():
        if not case.startswith("gram"):
            assert seen["contracted"] == 0, (
                f"{case} on sm_{arch} has fused multiply-adds: the bits differ from the CPU"
            )


def test_triton_kernels_move_sixteen_bytes_at_a_time(compiled):
    arch, cases = compiled
    for case, loads in WIDE_LOADS.items():
        assert cases[case]["wide_loads"] >= loads, f"{case} on sm_{arch}: {cases[case]['wide_loads']} of {loads}"
    assert cases["philox_normal"]["wide_stores"] == 2  # 1024 normals by 128 threads


def test_one_atomic_per_program_of_a_step_and_none_in_a_sum(compiled):
    _, cases = compiled
    for case, seen in cases.items():
        assert seen["atomics"] == (1 if case.startswith("solver_step") else 0), case


def test_registers_do_not_drift(compiled):
    arch, cases = compiled
    before = json.loads(BASELINE.read_text())["triton"][arch]
    assert set(before) == set(cases), "cases changed: run python tests/test_aot.py"
    for case, seen in cases.items():
        slack = max(0.1 * before[case], 4)
        assert abs(seen["registers"] - before[case]) <= slack, f"{case} on sm_{arch}: {before[case]} before, {seen}"


if __name__ == "__main__":
    registers = {
        arch: {case: seen["registers"] for case, seen in cases.items()}
        for arch, cases in _compiled("80", "90", "100", "120").items()
    }
    BASELINE.write_text(json.dumps({"triton": registers}, indent=2) + "\n")
