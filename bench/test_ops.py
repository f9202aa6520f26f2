"""The same cases under pytest-benchmark: `pytest bench --benchmark-only`."""

import importlib

import pytest

from fastdiff.ops import OPS

CASES = [
    pytest.param(case.contenders[name], id=f"{op}-{case.label}-{name}")
    for op in OPS
    for case in importlib.import_module(f"bench.cases.{op}").cases("cpu")
    for name in case.contenders
]


@pytest.mark.parametrize("run", CASES)
def test_speed(benchmark, run):
    benchmark(run)
