"""The side-by-side timing of whole models: what it computes around the clock, on the bundled models."""

import fcntl
import importlib.util
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the bench compares with diffusers' scheduler")

from bench.models import __main__ as command
from bench.models import openvino_graph, openvino_peer, profile, sampling
from bench.models.loaded import Unavailable
from bench.models.reference import relative_error
from bench.models.report import records, table
from bench.models.rounds import Limits, Measured, _groups, _undisturbed, measure
from bench.models.workloads import WORKLOADS, select


def test_a_name_without_its_batch_means_all_of_them():
    names = [w.name for w in select(["ddpm_cifar10", "bundled_unet", "sd15_64", "ddpm_cifar10_b1"])]
    bundled = ["bundled_unet_b1", "bundled_unet_b16", "bundled_unet_sampling_b1", "bundled_unet_sampling_b16"]
    assert names == ["ddpm_cifar10_b1", "ddpm_cifar10_b8", *bundled, "sd15_64"]


@pytest.mark.parametrize("arguments", [["--model", "nothing"], ["--variants", "nothing"], ["--rounds", "0"]])
def test_a_wrong_setting_is_named_before_anything_runs(arguments, capsys):
    assert command.main(arguments) == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bundled_dit_b16", "bundled_unet_sampling_b1", "ddpm_cifar10_b8", "sd15_32"])
def test_inputs_depend_on_the_seed_only(name):
    make = WORKLOADS[name].inputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        again = make(0)
    assert all(torch.equal(a, b) for a, b in zip(make(0), again, strict=True))
    assert not torch.equal(make(0)[0], make(1)[0]) and not torch.equal(make(0)[1], make(1)[1])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_our_loop_and_the_schedulers_loop_sample_the_same_images(kind):
    workload = WORKLOADS[f"bundled_{kind}_sampling_b1"]
    module = workload.build()
    with torch.no_grad():
        theirs = sampling.diffusers_loop(workload, lambda *inputs: workload.call(module, *inputs))()
        ours = sampling.our_loop(workload, module)()
    assert relative_error(ours, theirs) < 1e-4  # float32 through twenty steps


def test_calibration_sees_the_inputs_of_a_sampling():
    workload = WORKLOADS["bundled_dit_b1"]
    seen = sampling.trajectory(workload, lambda x, t, labels: torch.zeros_like(x), 3)
    assert torch.equal(seen[0][0], sampling._noise(workload)) and seen[0][2].tolist() == [0]
    assert [len(inputs) for inputs in seen] == [3, 3, 3]
    times = [float(t) for _, t, _ in seen]
    assert times == sorted(times, reverse=True) and times[0] == 999 and times[-1] < 60


def test_groups_fit_into_memory_and_all_hold_the_first_variant():
    # 2^20 parameters: 700 MB and 6, 5, 6 and 8 MB, and 1500 MB stay free
    names = ["fastdiff-w8a8", "torch-fp32", "torch-bf16", "torch-compile"]
    assert _groups(names, 1 << 20, 10_000) == [names]
    first, second, third = names[1:]
    assert _groups(names, 1 << 20, 1500 + 2117) == [names[:3], [names[0], third]]
    assert _groups(names, 1 << 20, 0) == [[names[0], other] for other in (first, second, third)]
    assert _groups(names[:1], 1 << 20, 0) == [names[:1]]


def test_rounds_hold_the_lock(tmp_path):
    path = tmp_path / "lock"
    with _undisturbed(Limits(lock=str(path))), open(path) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_samples_that_others_disturbed_do_not_count():
    entry = Measured("torch-fp32", seconds=[1.0, 9.0, 1.2, 1.1, 8.0], others=[0.0, 0.5, 0.01, 0.03, 0.3])
    assert entry.median == 1.1
    entry = Measured("torch-fp32", seconds=[5.0, 1.0, 4.0, 2.0, 3.0], others=[0.5, 0.1, 0.4, 0.2, 0.3])
    assert entry.median == 2.0  # of the three that were disturbed least


def test_numbers_of_a_row():
    first = Measured("torch-fp32", 1, seconds=[0.02] * 3, others=[0.0] * 3, relative_error=0.0)
    other = Measured("torch-bf16", 1, seconds=[0.01, 0.01, 0.005], others=[0.0] * 3, relative_error=1e-2)
    broken = Measured("openvino-int8", 1, error="no such runtime")
    about = {"flops": int(1e9), "parameters": 10}
    rows = records(WORKLOADS["dit_tiny"], about, [broken, first, other], {"fp32": 200.0})
    assert rows[1]["percent_of_peak"] == pytest.approx(25) and rows[2]["percent_of_peak"] is None
    assert rows[2]["ms"] == 10 and rows[2]["ms_min"] == 5 and rows[2]["time_to_first"] == pytest.approx(0.5)
    text = table(WORKLOADS["dit_tiny"], about, rows)
    assert "not available: no such runtime" in text and len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_relative_error_is_that_of_norms():
    a, b = np.array([3.0, 4.0], np.float32), np.array([0.0, 5.0], np.float32)
    assert relative_error(a, b) == pytest.approx(np.sqrt(10) / 5, rel=1e-12)


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="openvino and nncf not installed; pip install"):
        openvino_peer.load(WORKLOADS["dit_tiny"], "bf16", True, 1)


def test_exported_graphs_lie_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv(openvino_graph.CACHE, str(tmp_path))
    assert openvino_graph.graph_file(WORKLOADS["sd15_64"], True) == tmp_path / "sd15_b2_int8.xml"
    assert not openvino_graph.is_prepared(WORKLOADS["sd15_64"], True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_time_a_model_and_report_what_it_takes():
    about, found = measure(WORKLOADS["bundled_dit_b1"], ["torch-bf16"], Limits(threads=1, rounds=2))
    # linear layers: 64 tokens and the row of the embedding; attention: scores and values of 6 layers
    N, D, layers = 64, 192, 6
    tokens = N * (16 * D + layers * 12 * D * D + 16 * D) + 2 * layers * N * N * D
    rows = (layers + 1) * (256 * D + D * D) + layers * 6 * D * D + 2 * D * D
    assert about["flops"] == 2 * (tokens + rows)
    (entry,) = found
    assert entry.error is None and len(entry.seconds) == 2 and entry.setup["first call"] > 0
    assert 1e-4 < entry.relative_error < 0.05
    assert 0 < entry.after["rss_mb"] <= entry.after["peak_rss_mb"]


def test_a_profile_adds_the_calls_of_its_fastest_run():
    slow = [("linear", 9.0), ("copy", 1.0), ("linear", 9.0)]
    fast = [("linear", 2.0), ("copy", 5.0), ("linear", 2.0)]
    assert profile.summary([slow, fast]) == [("copy", 1, 5.0), ("linear", 2, 4.0)]


def test_a_profile_of_torch_names_the_products(capsys):
    assert profile.main(["--model", "bundled_dit_b1", "--variant", "torch-fp32", "--threads", "1"]) == 0
    counts = {line.split()[-1]: int(line.split()[-3]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert counts["aten::addmm"] == 6 * 9 + 2 + 2  # per block q, k, v, out, two of the mlp, three of the conditioning
