"""The feature cache in every pipeline: without a budget nothing changes, with one inner blocks are reused, run by run."""

import importlib.util

import pytest
import torch

import fastdiff
from fastdiff.ops import native

if native.cpu() is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs the compiled kernels and diffusers", allow_module_level=True)

from tiny_pipelines import TINY

# text encoders come from transformers, which takes seconds to import
FAMILIES = [name if name == "DiT" else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


def _reuse(pipe):
    parts = fastdiff.report(pipe).parts
    return (parts.get("unet") or parts["transformer"]).cache


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_budget_results_are_the_same(name):
    tiny = TINY[name]
    plain = tiny(fastdiff.accelerate(tiny.build()), rows=2)
    pipe = fastdiff.accelerate(tiny.build(), cache=fastdiff.Cache(budget=0.0))
    assert torch.equal(tiny(pipe, rows=2), plain)
    assert _reuse(pipe).computed > 0 and _reuse(pipe).reused == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_budget_inner_blocks_are_reused_anew_in_every_run(name):
    tiny = TINY[name]
    pipe = fastdiff.accelerate(tiny.build(), cache=fastdiff.Cache(budget=1e9, consecutive=99))
    out = tiny(pipe, steps=6)
    once = _reuse(pipe)
    assert out.isfinite().all() and once.reused >= once.computed > 0
    assert torch.equal(tiny(pipe, steps=6), out)
    assert (_reuse(pipe).reused, _reuse(pipe).computed) == (2 * once.reused, 2 * once.computed)
    told = str(fastdiff.report(pipe))
    assert f"reused for {2 * once.reused} of {2 * (once.reused + once.computed)} samples, " in told
    assert "x as fast" in told and "as estimated" in told
