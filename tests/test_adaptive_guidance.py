"""Adaptive guidance: where it ends, what it saves, one sample at a time."""

import math

import pytest
import torch

from fastdiff.guidance import CFG
from fastdiff.process import VPLinear
from fastdiff.sampler import Sampler
from fastdiff.steering import AdaptiveGuidance

SHAPE, STEPS, SCALE = (3, 5), 12, 4.0
SETTINGS = {"solver": "dpmpp-2m", "steps": STEPS}


def net(x, t, push):
    """The noise in unit Gaussian data; the condition pushes it aside, less and less towards the end."""
    column = lambda v: torch.as_tensor(v).to(x).view(-1, *[1] * (x.dim() - 1))
    _, sigma = VPLinear().schedule(t.double().numpy() / 999)
    return column(sigma) * x + column(push * (t / 999) ** 2)


def inputs(rows, guidance=SCALE):
    cond, negative = {"push": 0.2 * torch.tensor([float(r + 1) for r in rows])}, {"push": torch.zeros(len(rows))}
    return {"cond": cond, "negative": negative, "guidance": guidance, "seed": [10 + r for r in rows], **SETTINGS}


def cosine_of_each_call(row: int) -> list[float]:
    """In float64, along the trajectory with guidance throughout."""
    seen = []

    def watch(x, t, push):
        out = net(x, t, push)
        seen.append(out.double())
        return out

    Sampler(watch, prediction="noise", process=VPLinear()).sample((1, *SHAPE), **inputs([row]))
    return [float(torch.nn.functional.cosine_similarity(*(o.flatten() for o in both), dim=0)) for both in seen]


@pytest.mark.parametrize("row", (0, 3))
def test_guidance_ends_after_the_first_call_whose_branches_agree(row):
    cosines = cosine_of_each_call(row)
    assert len(cosines) == STEPS
    threshold = sum(sorted(cosines)[STEPS // 2 :][:2]) / 2
    last = next(i for i, c in enumerate(cosines) if c >= threshold)
    assert 0 < last < STEPS - 1
    hook = AdaptiveGuidance(threshold)
    sampler = Sampler(net, prediction="noise", process=VPLinear())
    ended = sampler.sample((1, *SHAPE), hooks=[hook], **inputs([row]))
    by_hand = sampler.sample((1, *SHAPE), **inputs([row], CFG(scale=(SCALE,) * (last + 1) + (1.0,))))
    assert (ended - by_hand).abs().max() <= 1e-5 * by_hand.abs().max()
    assert hook.evaluated.tolist() == [STEPS + last + 1]


@pytest.mark.parametrize(
    "threshold, first, calls", [(1 + 1e-6, 0, 2 * STEPS), (-1.0, 0, STEPS + 1), (-1.0, 4, STEPS + 5)]
)
def test_limits(threshold, first, calls):
    sampler = Sampler(net, prediction="noise", process=VPLinear())
    hook = AdaptiveGuidance(threshold, first)
    out = sampler.sample((2, *SHAPE), hooks=[hook], **inputs([0, 1]))
    guided = sampler.sample((2, *SHAPE), **inputs([0, 1], CFG(scale=(SCALE,) * (calls - STEPS) + (1.0,))))
    assert hook.evaluated.tolist() == [calls, calls]
    assert (out - guided).abs().max() <= 1e-5 * guided.abs().max()


def test_samples_end_alone():
    sampler = Sampler(net, prediction="noise", process=VPLinear())
    hook = AdaptiveGuidance(0.9999)
    together = sampler.sample((8, *SHAPE), hooks=[hook], **inputs(range(8)))
    assert len(set(hook.evaluated.tolist())) > 2
    for i in range(8):
        alone = AdaptiveGuidance(0.9999)
        assert torch.equal(sampler.sample((1, *SHAPE), hooks=[alone], **inputs([i]))[0], together[i])
        assert alone.evaluated[0] == hook.evaluated[i]


def test_without_guidance_nothing_happens():
    sampler = Sampler(net, prediction="noise", process=VPLinear())
    hook = AdaptiveGuidance(-1.0)
    out = sampler.sample((2, *SHAPE), hooks=[hook], **inputs([0, 1], 1.0))
    plain = sampler.sample((2, *SHAPE), **inputs([0, 1], 1.0))
    assert hook.evaluated.tolist() == [STEPS, STEPS] and (out - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("bad", ({"threshold": math.nan}, {"first": -1}))
def test_wrong_settings_say_so(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdaptiveGuidance(**bad)
