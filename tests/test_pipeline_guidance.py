"""Adaptive guidance in pipelines: as guidance that is switched off by hand, and never in the way of what is not guided."""

import importlib.util
import time

import pytest
import torch

import fastdiff
from fastdiff import AdaptiveGuidance
from fastdiff.ops import native

if native.cpu() is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs the compiled kernels and diffusers", allow_module_level=True)

from tiny_pipelines import TINY

from fastdiff.pipeline.paired_calls import PairedCalls

# text encoders come from transformers, which takes seconds to import
GUIDED = ["DiT", *(pytest.param(n, marks=pytest.mark.slow) for n in TINY if n not in ("DiT", "FLUX", "Wan"))]


def _run(name: str, guidance: AdaptiveGuidance | None, rows: int = 2, **call):
    tiny = TINY[name]
    pipe = fastdiff.accelerate(tiny.build(), guidance=guidance)
    return tiny(pipe, rows=rows, steps=4, **call), pipe


def _line(pipe) -> str:
    (line,) = fastdiff.report(pipe).guidance.values()
    return line


@pytest.mark.parametrize("name", GUIDED)
def test_a_threshold_that_is_never_reached_changes_nothing(name):
    plain, _ = _run(name, None)
    guided, pipe = _run(name, AdaptiveGuidance(1.5))
    assert torch.equal(plain, guided) and _line(pipe).startswith("adaptive guidance: 0 of ")


@pytest.mark.parametrize("name", GUIDED)
def test_after_two_calls_the_negative_branch_is_left_out(name):
    """In every run anew."""
    out, pipe = _run(name, AdaptiveGuidance(-1.0, first=1))
    total = int(_line(pipe).split(" of ")[1].split()[0])
    assert _line(pipe).startswith(f"adaptive guidance: {total - 4} of {total} negative evaluations left out, ")
    assert torch.equal(TINY[name](pipe, rows=2, steps=4), out)
    assert _line(pipe).startswith(f"adaptive guidance: {2 * total - 8} of {2 * total} negative evaluations left out, ")


def test_the_report_tells_speed_and_divergence():
    """Of a denoiser whose seconds and branches are known."""

    class Known(torch.nn.Module):
        def forward(self, hidden_states, timestep, class_labels):
            now[0] += 0.5 * len(hidden_states)
            return (hidden_states + class_labels[:, None] * torch.eye(4)[:1],)

    now = [0.0]
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    net = Known()
    paired = PairedCalls(net, AdaptiveGuidance(0.9)).around(net.forward)
    x = torch.tensor([[0.0, 2.0, 0.0, 0.0]]).repeat(2, 1)
    for t in (3, 2, 1):
        paired(x, timestep=t, class_labels=CONDITION)
    monkeypatch.undo()
    # branches (0.2, 2) and (0, 2): apart by 0.2 of |(0.2, 2)| or of |(0, 2)|; 6 rows in the time of 4
    line = str(paired)
    assert "2 of 3 negative" in line and "1.50x as fast" in line and "apart by 0.1 at most" in line


CONDITION = torch.tensor([0.2, 0.0])


@pytest.mark.slow
def test_it_equals_guidance_that_ends_by_hand():
    """The documented way of diffusers: a callback takes the guidance and half of the prompt embeddings away."""
    tiny = TINY["SD1.5"]

    def end(pipe, step, time, given):
        if step == 1:
            pipe._guidance_scale = 1.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    stock = tiny.build()
    by_hand = tiny(stock, steps=5, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    pipe = fastdiff.accelerate(tiny.build(), guidance=AdaptiveGuidance(-1.0, first=1))
    out = tiny(pipe, steps=5)
    assert (out - by_hand).abs().max() < 1e-4 * by_hand.abs().max()
    assert (tiny(stock, steps=5) - by_hand).abs().max() > 1e-3 * by_hand.abs().max()


def test_a_batch_without_guidance_is_left_alone():
    out, pipe = _run("DiT", AdaptiveGuidance(-1.0), guidance_scale=1.0)
    plain, _ = _run("DiT", None, guidance_scale=1.0)
    assert torch.equal(out, plain) and _line(pipe) == "adaptive guidance: 0 of 0 negative evaluations left out"


def test_guidance_is_for_pipelines():
    with pytest.raises(ValueError, match="hooks"):
        fastdiff.accelerate(torch.nn.Linear(4, 4), guidance=AdaptiveGuidance())
