"""Adaptive solvers: controllers against scipy and against k-diffusion's rule, errors against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from fastdiff.process import VE, Flow, VPLinear
from fastdiff.solvers.adaptive import denoiser, solve_adaptive
from fastdiff.solvers.exact import GaussianMixture, gaussian

DATA = GaussianMixture()
PROCESS = VPLinear()
DENOISE = lambda x, levels: torch.cat([DATA.denoise(v, row[None]) for row, v in zip(x, levels, strict=True)])


def start(rows=4, size=9, process=PROCESS, t=1.0):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, size)))
    return x * process.levels([t])[0].sigma


@pytest.mark.parametrize("process, ends", [(PROCESS, (1.0, 1e-3)), (VE(edm=False), (5.0, 0.05))])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_rk45_takes_scipys_steps(process, ends, rtol):
    x, calls = start(process=process, t=ends[0]), 0

    def slope(t, y):
        nonlocal calls
        calls += 1
        level = process.levels([t])[0]
        state = torch.from_numpy(y)
        data = DATA.denoise(level, state)
        return (level.alpha_rate * data + level.sigma_rate * (state - level.alpha * data) / level.sigma).numpy()

    want = solve_ivp(slope, ends, x.numpy().ravel(), method="RK45", rtol=rtol, atol=rtol)
    got, stats = solve_adaptive(DENOISE, x, process, "rk45", rtol=rtol, atol=rtol, interval=ends)
    np.testing.assert_allclose(got.numpy().ravel(), want.y[:, -1], rtol=1e-9, atol=1e-11)
    assert stats.calls == want.nfev and stats.accepted == (want.t.size - 1,)
    assert stats.evaluations == 4 * stats.calls


# the tolerance bounds each step's error; a few times as much may add up, and k-diffusion's controller accepts 1.9 times it
@pytest.mark.parametrize("kind, rtol, bound", [
    ("dpm-12", None, 0.05), ("dpm-23", None, 0.05), ("dpm-12-pid", None, 0.15), ("dpm-23-pid", None, 0.15),
    ("dpm-23", 1e-4, 1e-4), ("dpm-23-pid", 1e-4, 3e-4), ("rk45", 1e-5, 3e-4),
])  # fmt: skip
@pytest.mark.parametrize("norm", ["batch", "sample"])
def test_error_stays_below_the_tolerance(kind, rtol, bound, norm):
    x = start()
    atol = None if rtol is None else rtol * 0.156
    got, stats = solve_adaptive(DENOISE, x, PROCESS, kind, rtol=rtol, atol=atol, norm=norm)
    first, last = PROCESS.levels([PROCESS.t_max, PROCESS.t_min])
    assert float((got - DATA.flow(first, last, x)).abs().max()) < bound
    assert len(stats.accepted) == (1 if norm == "batch" else 4) and max(stats.accepted) < 400
    assert stats.calls < 900


def test_tighter_tolerances_cost_more_and_err_less():
    x, results = start(), []
    for rtol in (1e-2, 1e-3, 1e-4):
        got, stats = solve_adaptive(DENOISE, x, PROCESS, "dpm-23", rtol=rtol, atol=0.1 * rtol)
        want = DATA.flow(*PROCESS.levels([1.0, PROCESS.t_min]), x)
        results.append((float((got - want).abs().max()), stats.calls))
    errors, calls = zip(*results, strict=True)
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and calls[0] < calls[1] < calls[2]


def test_samples_with_their_own_steps_do_not_depend_on_their_batch():
    x = start()
    x[2] *= 4.0  # far from the data: other steps than its neighbours
    for kind in ("dpm-12", "dpm-23-pid", "rk45"):
        together, stats = solve_adaptive(DENOISE, x, PROCESS, kind, norm="sample")
        alone = [solve_adaptive(DENOISE, x[b : b + 1], PROCESS, kind, norm="sample") for b in range(4)]
        assert all(torch.equal(together[b : b + 1], result) for b, (result, _) in enumerate(alone))
        assert stats.accepted == tuple(own.accepted[0] for _, own in alone)
        assert stats.calls == max(own.calls for _, own in alone)
        coupled, _ = solve_adaptive(DENOISE, x, PROCESS, kind, norm="batch")
        assert not torch.equal(coupled, together)  # the published norms couple the batch


def textbook_pid(x, sigma, end, rtol, atol):
    """k-diffusion's adaptive DPM-Solver-23 in its own variables (alpha = 1), deterministic."""
    process, t, t_end, h = VE(edm=False), -math.log(sigma), -math.log(end), 0.05
    before, accepted, rejected = x, 0, 0
    eps = lambda y, t: (y - DATA.denoise(process.levels([math.exp(-t)])[0], y)) / math.exp(-t)
    while t < t_end - 1e-5:
        to = min(t_end, t + h)
        d, r = to - t, lambda f, t=t, d=None: math.exp(-(t + f * d))
        e0 = eps(x, t)
        u1 = x - r(1 / 3, d=d) * math.expm1(d / 3) * e0
        e1 = eps(u1, t + d / 3)
        low = x - r(1, d=d) * math.expm1(d) * e0 - r(1, d=d) / (2 / 3) * math.expm1(d) * (e1 - e0)
        u2 = x - r(2 / 3, d=d) * math.expm1(2 * d / 3) * e0
        u2 = u2 - r(2 / 3, d=d) * 2 * (math.expm1(2 * d / 3) / (2 * d / 3) - 1) * (e1 - e0)
        e2 = eps(u2, t + 2 * d / 3)
        high = x - r(1, d=d) * math.expm1(d) * e0 - r(1, d=d) / (2 / 3) * (math.expm1(d) / d - 1) * (e2 - e0)
        delta = torch.maximum(torch.tensor(atol, dtype=x.dtype), rtol * torch.maximum(low.abs(), before.abs()))
        error = float(torch.linalg.norm((low - high) / delta) / x.numel() ** 0.5)
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        if factor >= 0.81:
            before, x, t, accepted = low, high, to, accepted + 1
        else:
            rejected += 1
        h *= factor
    return x, accepted, rejected


def test_pid_controller_takes_k_diffusions_steps():
    process = VE(edm=False)
    x = start(process=process, t=20.0)
    want, accepted, rejected = textbook_pid(x, 20.0, 0.02, 0.01, 0.002)
    got, stats = solve_adaptive(DENOISE, x, process, "dpm-23-pid", rtol=0.01, atol=0.002, interval=(20.0, 0.02))
    assert (stats.accepted, stats.rejected) == ((accepted,), (rejected,)) and rejected > 0
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-10)


def test_a_network_of_any_prediction_type_serves_as_denoiser():
    process = Flow()
    data, x = gaussian(), start(process=process, t=0.99)
    got, _ = solve_adaptive(
        denoiser(data.net(process, "flow"), process, "flow"), x, process, "rk45", interval=(0.99, 0.01)
    )
    want = data.flow(*process.levels([0.99, 0.01]), x)
    assert float((got - want).abs().max()) < 2e-3  # float32 model times and tolerance


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="infinite at an end"):
        solve_adaptive(DENOISE, start(), Flow(), "rk45")
    with pytest.raises(ValueError, match="known are dpm-12"):
        solve_adaptive(DENOISE, start(), PROCESS, "rk23")
    empty, stats = solve_adaptive(DENOISE, start()[:0], PROCESS, norm="sample")
    assert empty.shape == (0, 9) and stats.calls == 0
