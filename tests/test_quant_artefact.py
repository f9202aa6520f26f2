"""Calibration sets, quantized models on disk, reports and the command line (T numbers: quantization specification)."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from quant_networks import NETS, model, quick, run, tiny_unet

from fastdiff.__main__ import main
from fastdiff.artefact import FolderStore, load, save
from fastdiff.models.checkpoint import load_checkpoint, save_checkpoint
from fastdiff.models.header import CheckpointError
from fastdiff.quant.calibration import CalibrationSet, all_steps, ndtc, ndtc_times, one_time, trajectories
from fastdiff.quant.config import QuantConfig
from fastdiff.quant.evaluate import check_gate, evaluate
from fastdiff.quant.layer import qlayers
from fastdiff.quant.perceptual import frechet_distance
from fastdiff.quant.recipes import RECIPES, Calibration, Recipe, recipe_of
from fastdiff.quant.schemes import Scheme, TensorSpec
from fastdiff.quantized import GateError, calibrate, measure, quantize, quantize_model, sampler_of


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_T50_save_load_save_is_the_same_file(tmp_path, name, recipe):
    given = model(name)
    made = quantize_model(given, quick(recipe))
    path = save(given, made, tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(run(again), run(given))
    weights, metadata = load_checkpoint(path)
    settings = json.loads((path.parent / "config.json").read_text())["quantization_config"]
    assert json.loads(metadata["quantization_config"]) == settings
    assert (
        QuantConfig.from_dict({k: v for k, v in settings.items() if k not in ("schemes", "layers", "times")})
        == made.config
    )
    second = dataclasses.replace(made, net=again.net)
    assert save(again, second, tmp_path / "b").read_bytes() == path.read_bytes()
    assert (tmp_path / "a/scheduler/scheduler_config.json").read_bytes() == (tmp_path / "b/scheduler/scheduler_config.json").read_bytes()  # fmt: skip
    assert sum(t.nbytes for t in weights.values()) < 0.65 * sum(p.nbytes for p in NETS[name]().parameters())


@pytest.fixture
def saved(tmp_path) -> Path:
    given = model("dit")
    return save(given, quantize_model(given, quick("w8a8-static")), tmp_path / "m")


def rewrite(path: Path, tensors: dict, metadata: dict) -> None:
    save_checkpoint(path, tensors, metadata)


def test_T50_files_that_disagree_are_refused(saved):
    tensors, metadata = load_checkpoint(saved)
    folder = saved.parent.parent
    config = json.loads((saved.parent / "config.json").read_text())

    def with_settings(**changes):
        settings = {**config["quantization_config"], **changes}
        (saved.parent / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        rewrite(saved, tensors, {**metadata, "quantization_config": json.dumps(settings, sort_keys=True)})

    with_settings()
    load(folder)
    layer = "transformer_blocks.0.attn1.to_q"
    for changes, words in (
        ({"version": 2}, "version"),
        ({"layers": {"nothing": 0}}, "no linear"),
        ({"layers": {layer: 7}}, "index"),
        ({"layers": [layer]}, "object"),
        ({"times": [1.0]}, "one value per entry"),
        ({"times": "now"}, "numbers"),
        ({"schemes": [{"weight": {"dtype": "int8"}, "split_input": 999}] * 9}, "split_input"),
    ):
        with_settings(**changes)
        with pytest.raises(ValueError, match=words):
            load(folder)
    (saved.parent / "config.json").write_text(json.dumps(config))
    rewrite(saved, tensors, metadata)
    load(folder)
    with pytest.raises(CheckpointError, match="differs from that of config.json"):
        rewrite(saved, tensors, {**metadata, "quantization_config": "{}"})
        load(folder)
    smaller = {
        **tensors,
        f"{layer}.weight": tensors[f"{layer}.weight"][:16],
        f"{layer}.bias": tensors[f"{layer}.bias"][:16],
    }
    smaller[f"{layer}.weight_scale"] = tensors[f"{layer}.weight_scale"][:16]
    rewrite(saved, smaller, metadata)
    with pytest.raises(ValueError, match="must hold .64, 64. codes"):
        load(folder)
    rewrite(saved, {k: v for k, v in tensors.items() if k != "proj_out_2.bias"}, metadata)
    with pytest.raises(CheckpointError, match="proj_out_2.bias"):
        load(folder)


def test_T40_times_are_normally_distributed():
    t = ndtc_times(200_000, 100, 0.4, 0.4, "clamp")
    share = lambda value: float((t == value).double().mean())
    assert share(0) == pytest.approx(0.1648, abs=0.005) and share(99) == pytest.approx(0.070, abs=0.005)
    assert float(ndtc_times(200_000, 100, 0.5, "paper").double().std()) == pytest.approx(7.06, abs=0.05)
    even = ndtc_times(200_000, 100, 0.4, 0.4, "resample")
    counts = torch.bincount(even, minlength=100).double() / 200_000
    assert int(even.min()) == 0 and int(even.max()) == 99 and len(counts) == 100
    assert float(counts[0]) < 1.2 * float(counts[2]) and float(counts[99]) < 1.3 * float(counts[95])
    with pytest.raises(ValueError, match="mean"):
        ndtc_times(10, 100, 0.6)
    with pytest.raises(ValueError, match="policy"):
        ndtc_times(10, 100, policy="wrap")


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "heun"])
def test_T41_samples_are_what_the_network_received(solver):
    given = model("dit")
    sampler = sampler_of(given)
    cond, negative = ({"class_labels": torch.tensor(v)} for v in ([1, 2, 3], [10] * 3))
    settings = {"solver": solver, "steps": 4, "cond": cond, "negative": negative, "guidance": 2.0}
    data = trajectories(sampler, (3, 1, 8, 8), seed=5, **settings)
    plan = sampler.plan(3, solver=solver, steps=4, guidance=2.0)
    states = [sampler.initial_state((3, 1, 8, 8), plan, 5)] + [
        s.x for s in sampler.step((3, 1, 8, 8), seed=5, **settings)
    ]
    assert len(data) == 6 * plan.ticks
    for tick in range(plan.ticks):
        x, t, labels = data.rows(slice(6 * tick, 6 * tick + 6))
        assert t.tolist() == pytest.approx([plan.time[tick, 0]] * 6, rel=1e-6)
        assert labels["class_labels"].tolist() == [1, 2, 3, 10, 10, 10]
        if solver != "heun":  # its second stage is not a state that a step returns
            assert torch.equal(x[:3], states[tick]) and torch.equal(x[3:], states[tick])
    assert data.times.tolist() == list(dict.fromkeys(data.t.tolist()))


def test_calibration_sets_select_their_steps():
    sampler = sampler_of(model("unet"))
    full = trajectories(sampler, (4, 1, 8, 8), solver="ddim", steps=5)
    half = all_steps(sampler, (4, 1, 8, 8), every=2, solver="ddim", steps=5)
    assert half.times.tolist() == full.times[::2].tolist() and len(half) == 12
    normal = ndtc(sampler, (4, 1, 8, 8), solver="ddim", steps=5)
    assert len(normal) == 4 and set(normal.t.tolist()) <= set(full.t.tolist())
    for x, t in zip(normal.x, normal.t, strict=True):
        assert any(torch.equal(x, y) for y, s in zip(full.x, full.t, strict=True) if s == t)
    single = one_time(sampler, (4, 1, 8, 8), t=0.0, solver="ddim", steps=5)
    assert single.t.unique().tolist() == [float(full.times[-1])] and len(single) == 4
    assert full.digest() == trajectories(sampler, (4, 1, 8, 8), solver="ddim", steps=5).digest() != half.digest()
    with pytest.raises(ValueError, match="same number of rows"):
        CalibrationSet(torch.zeros(2, 1), torch.zeros(3))


def test_evaluate_measures_what_it_says():
    given = model("dit")
    other = dataclasses.replace(given, net=copy.deepcopy(given.net))
    settings = {"solver": "ddim", "steps": 4, "cond": {"class_labels": torch.tensor([1, 2])}}
    same = evaluate(sampler_of(given), sampler_of(other), (2, 1, 8, 8), **settings)
    assert same["psnr_db"] == 200.0 and same["noise_sqnr_db"] == [200.0] * 4
    other.net.proj_out_2.weight.data *= 1.01
    other.net.proj_out_2.bias.data *= 1.01
    found = evaluate(sampler_of(given), sampler_of(other), (2, 1, 8, 8), **settings)
    assert found["noise_sqnr_db"] == pytest.approx([40.0] * 4, abs=1e-3)  # one percent of the signal
    assert len(found["steps"]) == 4 and found["steps"][-1]["psnr_db"] == found["psnr_db"] < 150
    assert check_gate(found, {"noise_sqnr_db_min": 39}) == []
    assert check_gate(found, {"noise_sqnr_db_min": 41}) == ["noise_sqnr_db_min is 40.00, below 41"]
    with pytest.raises(ValueError, match="unknown figure"):
        check_gate(found, {"beauty": 1})


class Lpips:
    """Stands for the package, whose weights come from the network."""

    @staticmethod
    def LPIPS(net: str, verbose: bool) -> torch.nn.Module:
        class Distance(torch.nn.Module):
            def forward(self, a, b):
                assert a.shape[1] == 3 and min(a.shape[-2:]) >= 64
                return (a - b).abs().mean((1, 2, 3), keepdim=True)

        return Distance()


def test_reports_have_lpips_and_frechet_where_they_can(monkeypatch):
    reference = model("dit")
    other = dataclasses.replace(reference, net=copy.deepcopy(reference.net))
    other.net.proj_out_2.weight.data *= 1.1
    real = torch.randn(6, 1, 8, 8)
    features = lambda images: images.flatten(1)[:, :5]
    monkeypatch.setitem(sys.modules, "lpips", Lpips)
    report, images = measure(reference, other, samples=4, steps=2, features=features, real=real)
    apart = [float((a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean()) for a, b in [images]]
    assert report["lpips"] == report["steps"][-1]["lpips"] == pytest.approx(apart[0], abs=1e-5) and apart[0] > 0
    for key, part in (("frechet", images[1]), ("frechet_reference", images[0])):
        assert report[key] == pytest.approx(frechet_distance(features(part), features(real)), rel=1e-4)
    monkeypatch.setitem(sys.modules, "lpips", None)  # not installed
    report, _ = measure(reference, other, samples=4, steps=2, features=features)
    assert "lpips" not in report and report["frechet"] > 0 and "frechet_reference" not in report


def test_measure_names_the_worst_layer():
    reference = model("dit")
    other = dataclasses.replace(reference, net=copy.deepcopy(reference.net))
    bad = (r"blocks\.1\.attn1\.to_v", Scheme(TensorSpec("int4")))
    made = quantize_model(
        other, Recipe("own", QuantConfig(Scheme(TensorSpec("int8")), (bad,), RECIPES["w8a8"].config.spared))
    )
    report, images = measure(reference, other, made, samples=2, steps=3, gate={"psnr_db": 500})
    assert report["spare"] == "transformer_blocks.1.attn1.to_v" and report["failures"]
    assert report["bytes"] == made.nbytes < report["bytes_reference"] and images[0].shape == (2, 1, 8, 8)
    layer = report["layers"]["transformer_blocks.0.attn1.to_q"]
    assert layer["bits"] == 8.5 and layer["weight_sqnr_db"] > 38
    assert report["output_sqnr_db"]["transformer_blocks.0.attn1.to_q"] > 35


def test_unfinished_runs_are_kept_in_a_folder(tmp_path):
    store = FolderStore(tmp_path / "work")
    assert store.get("0001-a") is None
    store.put("0001-a", {"l.weight": torch.ones(2, 3, dtype=torch.int8)})
    assert torch.equal(store.get("0001-a")["l.weight"], torch.ones(2, 3, dtype=torch.int8))
    first = model("unet")
    quantize_model(first, quick("w8a8"), store=store)
    again = model("unet")
    quantize_model(again, quick("w8a8"), store=store)
    state = again.net.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.net.state_dict().items())


def test_command_line_quantizes_compares_and_gates(tmp_path, capsys):
    out, small = tmp_path / "q", ["--samples", "2", "--steps", "2"]
    assert main(["quantize", "bundled:dit", "--recipe", "w8a16", "-o", str(out), *small, "--gate", "psnr_db=30"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["psnr_db"] > 40 and report["bytes"] < report["bytes_reference"] and report["ms"]["quantized"] > 0
    assert set(report["sqnr_db"]) == {n for n, v in report["layers"].items() if v["weight"]} and not report["failures"]
    page = (out / "report.md").read_text()
    assert "## Worst layers" in page and "transformer_blocks.0" in page and (out / "grid.png").stat().st_size > 100
    capsys.readouterr()
    failing = [
        "quantize",
        "bundled:dit",
        "--recipe",
        "w8a16",
        "-o",
        str(tmp_path / "bad"),
        *small,
        "--gate",
        "psnr_db=190",
    ]
    assert main(failing) == 1
    spare = json.loads((tmp_path / "bad/report.json").read_text())["spare"]
    assert spare in report["layers"] and f"spare {spare} first" in capsys.readouterr().out
    assert main(["compare", "bundled:dit", str(out), *small, "--json", "--gate", "psnr_db=190"]) == 1
    compared = json.loads(capsys.readouterr().out)
    assert compared["psnr_db"] == report["psnr_db"] and "below 190" in compared["failures"][0]
    assert main(["quantize", "bundled:dit", "--recipe", "w3a3", "-o", str(out)]) == 2
    assert "known are w8a8" in capsys.readouterr().err
    assert main(["compare", "bundled:dit", str(out), "--gate", "psnr_db"]) == 2


def test_recipes_are_data():
    for recipe in RECIPES.values():
        assert QuantConfig.from_json(recipe.config.to_json()) == recipe.config
        needs = any(
            s is not None and s.needs_data for s in (recipe.config.default, *(s for _, s in recipe.config.overrides))
        )
        assert needs == (recipe.calibration is not None), recipe.name
    assert recipe_of(RECIPES["w8a8"].config).calibration is None
    with pytest.raises(ValueError, match="unknown kind"):
        calibrate(model("unet"), Calibration("noise"))


def test_one_call_quantizes_modules_pipelines_and_models():
    given = model("dit")
    assert quantize(given, "w8a8-static").steps is not None  # drew its own calibration set
    net = tiny_unet()
    pipe = type("Pipe", (), {"unet": net})()
    assert quantize(pipe).net is net and len(quantize(tiny_unet(), RECIPES["w8a16"].config).layers) > 10
    with pytest.raises(TypeError, match="a module"):
        quantize("bundled:dit")
    with pytest.raises(ValueError, match="give data="):
        quantize(tiny_unet(), "w8a8-static")


def test_a_failed_gate_puts_the_layers_back():
    given = model("unet")
    want = run(given)
    with pytest.raises(GateError, match="the gate is 90 dB; spare ") as error:
        quantize(given, "w8a8", gate=90)
    assert error.value.layer in dict(given.net.named_modules()) and torch.equal(run(given), want)
    made = quantize(given, "w8a8", gate=20)
    with pytest.raises(RuntimeError, match="keep_originals"):
        made.undo()


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
def test_T51_every_load_gives_the_codes_and_scales_of_the_file(tmp_path, device):
    given = model("unet")
    path = save(given, quantize_model(given, quick("tfmq")), tmp_path / "m")
    tensors, _ = load_checkpoint(path)
    loaded = load(tmp_path / "m").net.to(device)
    layers = qlayers(loaded)
    assert len(layers) > 10
    for name, layer in layers.items():
        for part, value in layer.state_dict().items():
            assert value.device.type == device
            assert torch.equal(value.cpu(), tensors[f"{name}.{part}"]), f"{name}.{part}"
