"""Static ranges of int8 convolutions per step: from a trajectory, looked up by time, within the mode's bound."""

import copy

import pytest
import torch
from unet_networks import W8A8, bundled_unet, calls_of, decibels

import fastdiff
from fastdiff.cache import Cache
from fastdiff.ops import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

TIMES = (900.0, 100.0)


def _states(rows: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The second state is much smaller than the first, so that its ranges are others."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(rows, 3, 8, 8, generator=generator)
    return [(size * draw(), torch.full((rows,), t)) for size, t in zip((3.0, 0.1), TIMES, strict=True)]


def _calibrated(net, states, **settings):
    sample = lambda: [net(*state) for state in states]
    return fastdiff.accelerate(net, "w8a8", strict=True, calibration=sample, **settings)


@pytest.mark.parametrize("keep_original", (True, False))
@torch.no_grad()
def test_every_time_has_the_range_that_enters_its_convolutions(keep_original):
    net, states = bundled_unet(), _states()
    seen = []
    names = ("down_blocks.0.resnets.0.conv2", "up_blocks.1.resnets.0.conv1")
    with_hooks = copy.deepcopy(net)
    for name in names:
        with_hooks.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].abs().max()))
    truths = [with_hooks(*state) for state in states]
    _calibrated(net, states, keep_original=keep_original)
    assert calls_of(net) == {}
    layers = {layer.name: layer.runs for layer in fastdiff.report(net).layers}
    assert layers[names[0]] == "w8a8 static" and layers["conv_in"] == "float32"
    observed = net._fastdiff._observed
    assert observed.times.tolist() == list(TIMES)
    for i, name in enumerate(names):
        expected = torch.stack(seen[i :: len(names)]) / 127  # of the float module
        torch.testing.assert_close(observed.scales[name], expected, rtol=0.05, atol=0)
    for (x, t), truth in zip(states, truths, strict=True):
        assert decibels(net(x, t), truth) > W8A8
    (large, late), (_, early) = states
    assert decibels(net(large, early), net(large, late)) < 15  # the small ranges cut most of it off


@torch.no_grad()
def test_rows_at_different_times_take_their_own_ranges():
    net, states = bundled_unet(), _states(1)
    _calibrated(net, states, exact_time=False)
    alone = [net(x, t + 7) for x, t in states]  # the nearest times
    together = net(*(torch.cat(parts) for parts in zip(*[(x, t + 7) for x, t in states], strict=True)))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@torch.no_grad()
def test_parts_of_a_batch_that_the_feature_cache_computes_take_their_own_ranges():
    states = _states(1)
    plain, cached = _calibrated(bundled_unet(), states), _calibrated(bundled_unet(), states, cache=Cache(budget=0.5))
    x, t = (torch.cat(parts) for parts in zip(*states, strict=True))
    for _ in range(2):
        cached(x, t)
    x[1] = -x[1]  # the other sample is served from the cache
    assert decibels(cached(x, t), plain(x, t)) > 60
    assert fastdiff.report(cached).cache.reused == 1


@torch.no_grad()
def test_ranges_go_with_copies_and_away_with_undo():
    net, states = bundled_unet(), _states()
    truth = net(*states[0])
    _calibrated(net, states)
    assert torch.equal(copy.deepcopy(net)(*states[1]), net(*states[1]))
    fastdiff.undo(net)
    assert torch.equal(net(*states[0]), truth) and "_fastdiff" not in vars(net)


def test_calibration_that_cannot_serve_is_refused():
    net = bundled_unet()
    for mode, calibration, message in (
        ("bf16", lambda: None, "for mode 'w8a8', got 'bf16'"),
        ("w8a8", lambda: None, "no int8 convolution of the module was called"),
        ("w8a8", lambda: net(torch.full((1, 3, 8, 8), torch.nan), torch.zeros(1)), "NaN or infinity entered"),
    ):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            fastdiff.accelerate(net, mode, calibration=calibration)
        assert "forward" not in vars(net) and "_fastdiff" not in vars(net)
    with pytest.raises(ValueError, match="calibration needs a lowered family; Sequential"):
        fastdiff.accelerate(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)), "w8a8", calibration=lambda: None)
