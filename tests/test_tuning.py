"""Measured tiles: files that survive everything, choices that are valid whatever a file says, and the search without a GPU."""

import json
import os
import warnings

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastdiff import tuning
from fastdiff.__main__ import main
from fastdiff.cli.tune import line
from fastdiff.kernels import conv2d_launch, tuned

MACHINE = tuned.Machine(90, 132, "sm_90-132")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test with a folder of its own, and nothing read before."""
    monkeypatch.setenv("FASTDIFF_TUNED", str(tmp_path))
    for cached in (tuned.entries, conv2d_launch.tile_of):
        cached.cache_clear()
    yield tmp_path
    for cached in (tuned.entries, conv2d_launch.tile_of):
        cached.cache_clear()


def _calls(*types: str) -> dict:
    return tuning.convolutions(["sd15"], 2, list(types or ("int8",)), MACHINE)


def test_tiles_are_kept_and_read_again(own_folder):
    path = tuned.own_file(MACHINE.name)
    assert path == own_folder / "sm_90-132.json" and tuned.entries(MACHINE.name) == {}
    tuned.save(path, MACHINE.name, {"a": [1, 2], "b": [3]})
    tuned.save(path, MACHINE.name, {"b": [4]})
    assert tuned.entries(MACHINE.name) == {"a": [1, 2], "b": [4]}
    assert tuned.read(path, MACHINE.name) == {"a": [1, 2], "b": [4]} and os.listdir(own_folder) == [path.name]


def test_a_users_tiles_come_before_the_packages(own_folder, monkeypatch):
    monkeypatch.setattr(tuned, "SHIPPED", own_folder / "package")
    tuned.save(tuned.SHIPPED / "sm_90-132.json", MACHINE.name, {"a": [1], "b": [1]})
    tuned.save(tuned.own_file(MACHINE.name), MACHINE.name, {"b": [2]})
    assert tuned.entries(MACHINE.name) == {"a": [1], "b": [2]}


def _file(**changes) -> str:
    return json.dumps({"version": tuned.VERSION, "machine": MACHINE.name, "tiles": {"a": [1]}, **changes})


@pytest.mark.parametrize(
    "content, reason",
    (
        (b"", "Expecting value"),
        (_file()[:-9].encode(), "delimiter|Unterminated"),
        (b"\xff\xfe\x00", "codec"),
        (b"[" * 100_000, "recursion|maximum"),
        (b"[1, 2]", "no table of tiles"),
        (_file(tiles=[1]).encode(), "no table of tiles"),
        (_file(version=0).encode(), "version 0"),
        (_file(machine="sm_80-108").encode(), "for sm_80-108, not 1 for sm_90-132"),
    ),
    ids=("empty", "cut off", "binary", "deep", "list", "other tiles", "old", "foreign"),
)
def test_a_file_that_is_not_ours_is_ignored_with_one_warning(content, reason):
    path = tuned.own_file(MACHINE.name)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=reason) as told:
        assert tuned.entries(MACHINE.name) == {} and tuned.entries(MACHINE.name) == {}
    assert len(told) == 1 and "python -m fastdiff tune" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.save(path, MACHINE.name, {"a": [1]})  # written anew
    assert tuned.entries(MACHINE.name) == {"a": [1]}


def test_a_write_that_fails_leaves_the_old_file(own_folder, monkeypatch):
    path = tuned.own_file(MACHINE.name)
    tuned.save(path, MACHINE.name, {"a": [1]})
    for function in ("replace", "fsync"):
        with monkeypatch.context() as broken:
            broken.setattr(os, function, lambda *args: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                tuned.save(path, MACHINE.name, {"b": [2]})
        assert os.listdir(own_folder) == [path.name] and tuned.read(path, MACHINE.name) == {"a": [1]}


def test_the_fastest_tile_is_found_kept_and_used_afterwards():
    calls, wanted = _calls(), {}

    def clock(runs, device):
        """The last tile is twice as fast as all others."""
        assert len(runs) > 1 and all(callable(run) for run in runs.values())
        return {tile: 1.0 if tile != list(runs)[-1] else 0.5 for tile in runs}

    choices = list(tuning.tune(calls, MACHINE, CPU, 60, clock))
    assert [choice.key for choice in choices] == list(calls) and len(calls) == len(tuning.CONVOLUTIONS["sd15"])
    tuned.save(tuned.own_file(MACHINE.name), MACHINE.name, {c.key: list(c.after) for c in choices})
    conv2d_launch.tile_of.cache_clear()
    for choice in choices:
        wanted[choice.key] = conv2d_launch.tiles_for(90, calls[choice.key])[-1]
        assert choice.after == wanted[choice.key] == conv2d_launch.tile_of(MACHINE, calls[choice.key])
        assert choice.after_seconds == 0.5 and "us, " in line(choice)
    assert any(choice.before != choice.after for choice in choices)


def test_a_gain_within_the_noise_changes_nothing():
    clock = lambda runs, device: {tile: 1.0 - 0.02 * i / len(runs) for i, tile in enumerate(runs)}
    for choice in tuning.tune(_calls("bfloat16"), MACHINE, CPU, 60, clock):
        assert choice.after == choice.before and "unchanged" in line(choice)


def test_no_more_is_measured_than_there_is_time_for():
    clock = lambda runs, device: pytest.fail("measured without time")
    assert list(tuning.tune(_calls(), MACHINE, CPU, -1, clock)) == []


def test_nothing_is_measured_in_a_trace(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="capture or a trace"):
        next(tuning.tune(_calls(), MACHINE, CPU, 60, dict))


@pytest.mark.slow
def test_what_is_measured_is_the_convolution(monkeypatch):
    """In the interpreter: every set's result is written, and with the numbers of the op's reference."""
    monkeypatch.setattr(tuning, "FLIGHT", 1)
    sizes = conv2d_launch.Sizes(1, 4, 4, 4, 4, 3, 1, 1, 1, 1)
    call = conv2d_launch.Call(sizes, (16,), 20, torch.int8, 1, False)
    seen = []
    launch = conv2d_launch.conv2d_triton
    monkeypatch.setattr(conv2d_launch, "conv2d_triton", lambda *args: (launch(*args), seen.append(args)))
    monkeypatch.setattr(conv2d_launch, "tiles_for", lambda arch, call: [conv2d_launch.INTERPRETED_TILE])
    (run,) = tuning._runs(call, MACHINE, CPU).values()
    run()
    assert len(seen) == 2
    for out, ((x, _),), rows, *_ in seen:
        weight = rows[:20].view(20, 3, 3, 16).permute(0, 3, 1, 2).double()
        want = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2).double(), weight, padding=1).permute(0, 2, 3, 1)
        assert torch.equal(out, want.float().bfloat16())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is that of a machine without a GPU")
def test_the_command_says_what_it_needs(capsys):
    assert main(["tune", "--models", "sdxl"]) == 2
    assert "fastdiff tune: nothing to tune here: torch sees no CUDA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_on_a_gpu_writes_what_it_measured(own_folder, capsys):
    assert main(["tune", "--models", "sd15", "--types", "int8", "--budget", "5", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["choices"] and all(c["after_seconds"] <= c["before_seconds"] for c in found["choices"])
    assert os.listdir(own_folder) == [os.path.basename(found["file"])]
