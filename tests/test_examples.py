"""The scripts in examples/ and the Python of the README run as they stand."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.ops import native

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    if "diffusers" in script.read_text():
        pytest.importorskip("diffusers")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d", done.stdout), "an example shows a number"


class _Net(nn.Module):
    """Any denoiser: predicts v of images `[B, C, H, W]` under a condition `[B, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.linear(torch.cat([t[:, None], c], dim=1))[:, :, None, None]


def _pipeline():
    from tiny_pipelines import TINY

    return TINY["SD1.5"].build()


def _adapter(pipe, path: Path) -> None:
    """Saves a LoRA for the cross-attention of a pipeline's network."""
    from safetensors.torch import save_file

    layers = {name: layer for name, layer in pipe.unet.named_modules() if name.endswith("attn2.to_q")}
    down = {f"unet.{name}.lora_A.weight": torch.ones(2, layer.in_features) for name, layer in layers.items()}
    up = {f"unet.{name}.lora_B.weight": torch.ones(layer.out_features, 2) for name, layer in layers.items()}
    save_file(down | up, path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_of_the_readme_runs(number, tmp_path, monkeypatch):
    """Each with the names that it takes for granted: a network, conditions, a pipeline."""
    code = SNIPPETS[number]
    if "pipe" in code and (
        importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("transformers") is None
    ):
        pytest.skip("needs diffusers and transformers")
    monkeypatch.chdir(tmp_path)
    net = _Net().eval()
    names = {
        "fastdiff": fastdiff,
        "torch": torch,
        "net": net,
        "sampler": fastdiff.Sampler(net, prediction="v"),
        "c": torch.ones(3, 4),
        "null": torch.zeros(3, 4),
    }
    if "pipe" in code:
        names["pipe"] = _pipeline()
        _adapter(names["pipe"], tmp_path / "style.safetensors")
    exec(compile(code, f"README.md, snippet {number + 1}", "exec"), names)


def test_the_readme_has_snippets():
    assert len(SNIPPETS) >= 4 and len(EXAMPLES) >= 4
