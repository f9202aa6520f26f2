"""The command line as a user calls it: outputs, files, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.__main__ import main
from fastdiff.images import grid, save_png
from fastdiff.ops import native


def output(capsys, *arguments) -> dict:
    code = main([*arguments, "--json"])
    return {"code": code, **json.loads(capsys.readouterr().out)}


def test_info_says_why_a_kernel_cannot_run(capsys):
    found = output(capsys, "info")
    assert set(found["kernels"]) >= {"solver_step", "gram", "philox_normal"}
    for variants in found["kernels"].values():
        assert variants["reference"] == ""
        if not torch.cuda.is_available() and "cuda" in variants:
            assert "torch sees no CUDA GPU" in variants["cuda"]
    assert main(["info"]) in (0, 1)
    assert "solver_step:" in capsys.readouterr().out


def test_info_without_native_code_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda name: (None, "No module named 'fastdiff._cpu'"))
    for found in (native.cpu, native.cpu_missing):
        monkeypatch.setattr(native, found.__name__, found.__wrapped__)
    main(["info"])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CPU:")]
    assert "the C++ kernels are not built" in told[0] and "reinstall with a C++17 compiler" in told[0]


def test_sample_writes_a_grid_with_its_recipe(capsys, tmp_path):
    out = tmp_path / "grid.png"
    arguments = ["sample", "--count", "3", "--classes", "1", "9", "--steps", "3", "--seed", "5", "--out", str(out)]
    report = output(capsys, *arguments)
    image = Image.open(out)
    recipe = json.loads(image.text["fastdiff"])
    assert image.size == (3 * 34 + 2, 36) and np.asarray(image).std() > 10
    assert recipe["plan"] == report["plan"] and recipe["seed"] == 5 and recipe["kernels"]["solver_step"]
    assert report["network_calls"] == 3 * 3 * 2
    assert report["max_difference_to_plain_torch"] < 1e-3
    first = np.asarray(image)
    output(capsys, *arguments, "--no-compare")
    assert np.array_equal(np.asarray(Image.open(out)), first)


def test_sample_runs_quantized_models_on_their_own_layers(capsys, tmp_path):
    settings = ["--samples", "2", "--steps", "2"]
    assert output(capsys, "quantize", "bundled:unet", "-o", str(tmp_path / "q"), *settings)["code"] == 0
    arguments = ["--count", "1", "--steps", "2", "--no-compare", "--out", str(tmp_path / "a.png")]
    report = output(capsys, "sample", "--model", str(tmp_path / "q"), *arguments)
    assert report["code"] == 0 and report["mode"] == "none" and (tmp_path / "a.png").exists()


def test_sample_reads_any_folder_and_unconditional_models(capsys, tmp_path):
    report = output(capsys, "sample", "--model", "bundled:unet", "--count", "1", "--steps", "2", "--solver", "euler-a",
                    "--out", str(tmp_path / "u.png"))  # fmt: skip
    assert report["network_calls"] == 2 and "speedup" not in report


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sample", "--solver", "dpmpp-2"], "dpmpp-2m"),
        (["sample", "--steps", "0"], "steps: must be an integer >= 1"),
        (["sample", "--count", "0"], "--count must be >= 1"),
        (["sample", "--classes", "12"], "labels must be in 0..9"),
        (["sample", "--model", "bundled:unet", "--classes", "1"], "unconditional"),
        (["sample", "--model", "no/such/folder"], "no/such/folder"),
        (["verify", "--solvers", "eulr"], "euler"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_verify_certifies_and_fails(capsys, monkeypatch):
    assert main(["verify", "--solvers", "ddim", "dpmpp-2m"]) == 0
    assert "2 passed, 0 failed" in capsys.readouterr().out


def test_grid_places_every_image():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    sheet = grid(images, columns=3, padding=1)
    assert sheet.shape == (11, 16)
    assert [sheet[2 + 5 * (b // 3), 2 + 5 * (b % 3)] for b in range(5)] == [0, 64, 128, 191, 255]
    with pytest.raises(ValueError, match="images must be"):
        grid(torch.zeros(0, 1, 4, 4))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, np.zeros((4, 4), np.uint8), {})
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(path, np.ones((4, 4), np.uint8), {})
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "arguments, message",
    [(["no_such_op"], "gram"), (["gram", "--shape", "2x3"], "2,4,64,64"), (["gram", "--dtype", "int8"], "bfloat16")],
)
def test_bench_refuses_what_it_cannot_time(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nothing_of_the_current_folder_runs(tmp_path):
    (tmp_path / "bench.py").write_text("raise SystemExit('ran')")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    # like -m, -c puts the current folder first on the path
    code = "from fastdiff.__main__ import main; print(main(['verify', '--solvers', 'x']), main(['bench', 'nonesuch']))"
    arguments = [sys.executable, "-c", code]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "2"] and "ran" not in done.stderr, done.stderr
    assert "live in the repository" in done.stderr and "unknown solver 'x'" in done.stderr


def test_bench_gate_looks_at_the_chosen_peers():
    from bench.ops import Settings, _is_below

    records = [{"ratio": {"torch": 0.5, "diffusers": 3.0}}]
    assert _is_below(records, Settings(gate=1.0)) and not _is_below(
        records, Settings(gate=1.0, against=("diffusers",))
    )
    assert not _is_below(records, Settings())
