"""The feature cache: estimates against closed forms, one sample at a time, one run at a time."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.cache import Cache, FeatureCache
from fastdiff.cli.sample import process_of
from fastdiff.models.load import load_model
from fastdiff.ops import native

E = 64
needs_cpu = pytest.mark.skipif(native.cpu() is None, reason=native.cpu_missing() or "")


class Inner:
    """Inner blocks with a known result: `gain * outer + offset`, so that reuse costs gain * |change| / |result|."""

    def __init__(self, gain: float = 3.0, offset: float = 0.0) -> None:
        self.gain, self.offset = gain, offset
        self.rows: list[list[int]] = []

    def of(self, outer: torch.Tensor):
        def compute(index):
            taken = outer if index is None else outer[index]
            self.rows.append(list(range(len(outer))) if index is None else index.tolist())
            return self.gain * taken + self.offset

        return compute


def run(cache, inner, outers, times, adds=False, conditioning=()):
    """Served features of a run, one per call."""
    time = lambda t, x: torch.full((len(x),), float(t)) if np.ndim(t) == 0 else torch.tensor(t, dtype=torch.float32)
    return [cache.serve(x, time(t, x), conditioning, inner.of(x), adds) for x, t in zip(outers, times, strict=True)]


def moving(step: float, calls: int, rows: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """Outer features that grow by a constant in each call."""
    start = torch.randn(rows, E, generator=torch.Generator().manual_seed(seed))
    return [start * (1 + step * n) for n in range(calls)]


def test_a_budget_of_nothing_computes_all():
    cache, inner = FeatureCache(Cache(budget=0.0)), Inner()
    outers = moving(0.01, 6)
    served = run(cache, inner, outers, range(6))
    assert len(inner.rows) == 6 and cache.reuse.reused == 0
    for outer, got in zip(outers, served, strict=True):
        assert torch.equal(got, 3 * outer)


def test_outer_features_that_do_not_move_cost_nothing():
    cache, inner = FeatureCache(Cache(budget=0.0, consecutive=99)), Inner()
    outers = moving(0.01, 2) + [moving(0.01, 2)[1]] * 3
    run(cache, inner, outers, range(5))
    assert len(inner.rows) == 2 and cache.reuse.reused == 3 and cache.reuse.worst_estimate == 0


@pytest.mark.parametrize("adds", (False, True))
def test_the_estimate_is_the_error(adds):
    """The result is proportional to the outer features, so that relative errors are known; budget 2.5 steps."""
    step, gain = 1e-3, 3.0
    cache, inner = FeatureCache(Cache(budget=2.5 * step, consecutive=99)), Inner(gain)
    outers = moving(step, 8)
    served = run(cache, inner, outers, range(8), adds)
    # reuse of what was added costs (gain - 1) / gain of the change
    computed = len(inner.rows)
    assert computed == (4 if not adds else 3)
    for outer, got in zip(outers, served, strict=True):
        error = ((got - gain * outer).norm() / (gain * outer).norm()).item()
        assert error <= 2.5 * step * 1.02
    assert cache.reuse.worst_estimate <= 2.5 * step
    assert cache.reuse.measured == pytest.approx(
        {False: np.mean([1, 3, 3]), True: np.mean([1, 4]) * 2 / 3}[adds] * step, rel=0.02
    )


def test_consecutive_reuse_is_bounded():
    cache, inner = FeatureCache(Cache(budget=1.0, first=3, consecutive=2)), Inner()
    run(cache, inner, moving(1e-4, 9), range(9))
    assert len(inner.rows) == 3 + 2 and cache.reuse.reused == 4


def test_a_sample_decides_alone():
    """Rows that move at other speeds are computed at other times, and have the bits that they have alone."""
    speeds = (1e-4, 3e-3, 1e-2)
    outers = [torch.cat(rows) for rows in zip(*(moving(s, 10, seed=i) for i, s in enumerate(speeds)), strict=True)]
    settings = Cache(budget=8e-3, consecutive=4)
    together, inner = FeatureCache(settings), Inner()
    served = run(together, inner, outers, range(10))
    assert any(0 < len(rows) < 3 for rows in inner.rows)
    for i in range(3):
        alone = run(FeatureCache(settings), Inner(), [x[i : i + 1] for x in outers], range(10))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, served, strict=True))


def test_time_that_turns_around_begins_another_run():
    cache, inner = FeatureCache(Cache(budget=1.0)), Inner()
    times = [3, 2, 1, 3, 2, 1]
    run(cache, inner, moving(1e-4, 6), times)
    assert len(inner.rows) == 4 and cache.reuse.reused == 2
    rows = [[3, 3], [2, 2], [1, 3], [0, 2]]  # the second sample begins again in the third call
    cache, inner = FeatureCache(Cache(budget=1.0)), Inner()
    run(cache, inner, moving(1e-4, 4, rows=2), rows)
    assert inner.rows == [[0, 1], [0, 1], [1], [1]]


def test_conditioning_tells_runs_apart():
    """Branches of guidance in calls of their own take turns, each with its own features."""
    cache, settings = FeatureCache(Cache(budget=1.0, consecutive=9)), []
    inner = Inner()
    a, b = torch.zeros(1, 4), torch.ones(1, 4)
    for n, (x, y) in enumerate(zip(moving(1e-4, 5, seed=0), moving(1e-4, 5, seed=1), strict=True)):
        settings.append(
            (run(cache, inner, [x], [n], conditioning=(a,)), run(cache, inner, [y], [n], conditioning=(b,)))
        )
    assert len(inner.rows) == 4
    (first,), (second,) = settings[-1]
    assert torch.equal(first, 3 * moving(1e-4, 5, seed=0)[1]) and torch.equal(second, 3 * moving(1e-4, 5, seed=1)[1])


def test_cleared_features_are_computed_again():
    cache, inner = FeatureCache(Cache(budget=1.0)), Inner()
    run(cache, inner, moving(1e-4, 3), range(3))
    cache.clear()
    run(cache, inner, moving(1e-4, 1), [3])
    assert len(inner.rows) == 3


@pytest.mark.parametrize("bad", ({"budget": -1}, {"budget": float("nan")}, {"first": 1}, {"consecutive": 0}))
def test_wrong_settings_say_so(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Cache(**bad)


def sampled(name: str, rows: int, steps: int = 12, first: int = 0, **options) -> tuple[torch.Tensor, fastdiff.Report]:
    """Samples of a bundled model in float32 on the fused kernels, and the report."""
    model = load_model(f"bundled:{name}")
    labels = {"class_labels": torch.arange(first, first + rows)}
    cond = labels if model.num_classes else {}
    fastdiff.accelerate(model.net, deterministic="batch", **options)
    sampler = fastdiff.Sampler(model.net, prediction=model.prediction, process=process_of(model.scheduler_config))
    shape = (rows, model.channels, model.size, model.size)
    images = sampler.sample(shape, cond=cond, solver="dpmpp-2m", steps=steps, seed=list(range(first, first + rows)))
    return images, fastdiff.report(model.net)


@needs_cpu
@pytest.mark.parametrize("name", ("dit", "unet"))
def test_three_programs_compute_what_one_does(name):
    plain, _ = sampled(name, 1, steps=3)
    cached, report = sampled(name, 1, steps=3, cache=Cache(budget=0.0))
    assert torch.equal(plain, cached) and report.cache.reused == 0 and report.cache.computed == 3


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ("dit", "unet"))
def test_a_larger_budget_saves_more_and_costs_more(name):
    plain, _ = sampled(name, 1)
    reused, errors = [], []
    for budget in (0.1, 0.4):
        images, report = sampled(name, 1, cache=Cache(budget))
        assert report.cache.worst_estimate <= budget and "inner blocks reused" in str(report)
        reused.append(report.cache.reused)
        errors.append(((images - plain).norm() / plain.norm()).item())
    assert 0 <= reused[0] < reused[1] and errors[0] < errors[1] < 1


@needs_cpu
@pytest.mark.parametrize("cache", (None, Cache(0.5)))
def test_samples_have_the_bits_that_they_have_alone(cache):
    together, report = sampled("dit", 3, steps=8, cache=cache)
    assert cache is None or 0 < report.cache.reused
    for i in (1, 2):
        alone, _ = sampled("dit", 1, steps=8, first=i, cache=cache)
        assert torch.equal(alone[0], together[i])


@needs_cpu
def test_a_module_without_stages_is_refused():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="feature cache needs a lowered family"):
        fastdiff.accelerate(net, cache=Cache())
    assert "forward" not in vars(net)
    with pytest.raises(TypeError, match=r"fastdiff\.Cache"):
        fastdiff.accelerate(net, cache=0.1)
