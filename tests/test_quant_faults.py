"""Quantizing and saving while processes die and disks are full (T numbers: quantization specification)."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quant_networks import model, quick, run

from fastdiff.artefact import FolderStore, load, save
from fastdiff.models.header import CheckpointError
from fastdiff.quantized import quantize_model

_KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from fastdiff.artefact import FolderStore
from quant_networks import model, quick
from fastdiff.quantized import quantize_model

class Dies(FolderStore):
    left = 3
    def put(self, key, tensors):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        super().put(key, tensors)

quantize_model(model("unet"), quick("w4a8-svd"), store=Dies(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_blocks_that_the_next_one_takes(tmp_path):
    code = _KILLED.format(tests=str(Path(__file__).parent))
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "blocks")], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "blocks").iterdir()}
    assert len(kept) == 3
    resumed, plain = model("unet"), model("unet")
    quantize_model(resumed, quick("w4a8-svd"), store=FolderStore(tmp_path / "blocks"))
    quantize_model(plain, quick("w4a8-svd"))
    assert all((tmp_path / "blocks" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert torch.equal(run(resumed), run(plain))


@pytest.mark.slow
@pytest.mark.parametrize("call", ("open", "write", "fchmod", "fsync", "replace"))
def test_T50_a_fault_while_saving_tears_no_file(tmp_path, monkeypatch, call):
    """Every such call fails once: files are the old or the new ones, and what is loaded is one artefact or an error."""
    folders, made = {}, {}
    for recipe in ("w8a16", "w4a16"):
        given = model("dit")
        made[recipe] = (given, quantize_model(given, quick(recipe)))
        save(*made[recipe], tmp_path / recipe)
        folders[recipe] = {p.relative_to(tmp_path / recipe): p.read_bytes() for p in (tmp_path / recipe).rglob("*") if p.is_file()}  # fmt: skip
    outcomes, real = [], getattr(os, call)
    for at in range(1, 100):
        target, calls = tmp_path / f"t{at}", []
        shutil.copytree(tmp_path / "w8a16", target)

        def faulty(*args, at=at, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == at:
                raise OSError(errno.ENOSPC, "no space left")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, faulty)
            try:
                save(*made["w4a16"], target)
            except OSError:
                pass
        files = {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        assert files.keys() == folders["w8a16"].keys()
        assert all(blob in (folders["w8a16"][name], folders["w4a16"][name]) for name, blob in files.items())
        try:
            got = run(load(target))
        except CheckpointError:
            outcomes.append("refused")
        else:
            outcomes.append(next(name for name, (given, _) in made.items() if torch.equal(run(given), got)))
        if len(calls) < at:
            break
    assert outcomes[-1] == "w4a16" and len(outcomes) > 3 and "w8a16" in outcomes
