"""The host side of the GPU suite, on a CPU: which cases it times, how it skips, what it writes."""

import dataclasses
import time

import pytest
import torch

from bench import gpu, gpu_checks, gpu_networks, gpu_ops
from bench.cases import Case
from bench.models.workloads import WORKLOADS
from fastdiff.ops import OPS
from fastdiff.ops.registry import forced_backend


class Eager:
    """A graph that replays by calling: what StepGraph is on a GPU, without the capture."""

    def __init__(self, body, device):
        self.body = body
        body()

    def replay(self):
        self.body()


@pytest.fixture
def small(monkeypatch):
    """Two ops only, at tiny shapes."""
    monkeypatch.setattr(gpu_ops, "OPS", {name: OPS[name] for name in ("quantize_rows", "solver_step")})
    monkeypatch.setattr(gpu_ops, "FLIGHT", 100.0)
    monkeypatch.setattr("bench.cases.quantize_rows.GPU_SHAPES", ((3, 8),))
    # seconds that the suite's logic does not need
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_ops_with_shapes_have_them_in_their_case_file():
    shapes = {name: gpu_ops.shapes_of(name) for name in OPS}
    assert shapes["attention"] and shapes["norm_modulate"] == shapes["gated_norm_modulate"]
    assert shapes["gram"] == ()


def test_timings_name_every_contender_and_every_refusal(small):
    records = list(gpu_ops.op_timings("cpu", 1e10, 0.01, time.monotonic() + 60, lambda run, device: run() or run))
    by_label = {record["contender"]: record for record in records}
    assert {"fastdiff", "torch"} <= set(by_label)
    assert by_label["fastdiff"]["sets"] >= 2 and by_label["fastdiff"]["fraction_of_memory"] > 0
    for record in records:
        line = gpu.table_line(record)
        assert line.startswith("| quantize_rows | ") and ("skipped" in line) == ("skipped" in record)


@pytest.mark.slow
def test_networks_are_timed_beside_torch(small):
    workload = WORKLOADS["dit_tiny"]
    records = list(gpu_networks.network_timings([workload], "cpu", 1e10, 0.01, time.monotonic() + 60))
    assert [r["contender"] for r in records] == [*gpu_networks.FIRST, *gpu_networks.SECOND]
    for record in records:
        assert 1e-4 < record["relative_error"] < 3e-2 and record["median_us"] > 0 and record["tflops"] > 0
        assert gpu.table_line(record).startswith("| network | dit_tiny | ")
    torch16, ours16, ours8 = (record["weights"] for record in records[:3])
    assert ours8 < ours16 < torch16  # what depends on the timestep only is not read in a call
    late = list(gpu_networks.network_timings([workload], "cpu", 1e10, 0.01, time.monotonic() - 1))
    assert len(late) == 5 and all("no time left" in gpu.table_line(record) for record in late)


def test_no_time_left_is_said_per_shape(small):
    (record,) = gpu_ops.op_timings("cpu", 1e10, 0.01, time.monotonic() - 1)
    assert record == {"op": "quantize_rows", "shape": (3, 8), "skipped": "no time left"}
    assert "no time left" in gpu.table_line(record)


def test_variants_are_forced_while_all_calls_run():
    seen = []
    gpu_ops.in_turn([lambda: seen.append(forced_backend())] * 2, "reference")()
    assert seen == ["reference", "reference"] and forced_backend() is None


def test_a_variant_that_is_wrong_at_a_real_shape_fails(monkeypatch):
    op = OPS["activate"]
    x = torch.randn(64)
    off = [0.0]
    case = Case("64", {"fastdiff": lambda: op(x, "silu") + (off[0] if forced_backend() != "reference" else 0)}, 1)
    variants = [v for v in op.variants if v.name in ("cpu", "reference")]
    monkeypatch.setattr(op, "variants", [dataclasses.replace(v, devices=("cpu", "cuda")) for v in variants])
    monkeypatch.setattr(op, "_ready", {})
    (good,) = gpu_checks._check_case(op, case, "fastdiff")
    off[0] = 0.1
    (bad,) = gpu_checks._check_case(op, case, "fastdiff")
    assert good["pass"] and good["distance"] < 1e-5 and not bad["pass"] and bad["distance"] > 0.05


def test_a_replay_that_does_not_write_fails(monkeypatch):
    op = OPS["quantize_rows"]
    monkeypatch.setattr(gpu_checks, "OPS", {op.name: op})
    results = list(gpu_checks.check_graphs("cpu", Lost))
    assert {"cpu"} <= {record["variant"] for record in results}
    assert not any(record["pass"] for record in results)


class Lost(Eager):
    """A graph that captured nothing."""

    def replay(self):
        pass
