"""Processes and conversions against values computed from x0, noise and x directly."""

import numpy as np
import pytest

from fastdiff.process import (
    PREDICTIONS,
    VE,
    Flow,
    Level,
    MeanReverting,
    Process,
    SubVP,
    TrigFlow,
    VPCosine,
    VPDiscrete,
    VPLinear,
    convert,
    discrete_alphas,
)

PROCESSES = (VPLinear(), SubVP(), VPCosine(), VPDiscrete(), VE(), Flow(), TrigFlow(), MeanReverting(sigma_max=0.7))
ids = lambda value: type(value).__name__


def predictions(level: Level, x0: float, noise: float, x: float) -> dict[str, float]:
    """Every kind of network output, written out by hand."""
    sd = level.sigma_data
    sigma = level.sigma / level.alpha
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / np.sqrt(sigma**2 + sd**2)
    return {
        "noise": noise,
        "data": x0,
        "v": level.alpha * noise - level.sigma * x0,
        "flow": level.alpha_rate * x0 + level.sigma_rate * noise,
        "score": -noise / level.sigma,
        "edm": (x0 - c_skip * x / level.alpha) / c_out,
        "trig": level.alpha * noise - level.sigma * x0,
    }


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_every_prediction_converts_to_every_other(process):
    random = np.random.default_rng(0)
    for level in process.levels(np.linspace(0.05, 0.95, 7) * process.t_max):
        x0, noise, u = random.normal(size=3)
        x = level.alpha * x0 + level.sigma * noise + level.mean * u
        values = predictions(level, x0, noise, x)
        assert set(values) == set(PREDICTIONS)
        for source, m in values.items():
            for target, want in values.items():
                a, b, d = convert(source, target, level)
                scale = max(1.0, abs(a * x), abs(b * m), abs(d * u))
                assert abs(a * x + b * m + d * u - want) <= 1e-12 * scale, (source, target)


def test_a_linear_mix_converts():
    level = Flow().levels(np.array([0.3]))[0]
    x0, noise = 0.7, -1.1
    x = level.alpha * x0 + level.sigma * noise
    a, b, d = convert((0.4, 1.5, 0.2), "data", level)
    assert a * x + b * (0.4 * x0 + 1.5 * noise + 0.2 * x) == pytest.approx(x0, abs=1e-14)


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_time_of_lam_inverts_lam(process):
    t = np.linspace(0.02, 0.98, 23) * process.t_max
    np.testing.assert_allclose(process.time_of_lam(process.lam(t)), t, rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_rates_are_derivatives(process):
    t = np.linspace(0.12, 0.88, 5) * process.t_max  # not at the knots of a table
    np.testing.assert_allclose(process.rates(t), Process.rates(process, t), rtol=1e-5, atol=1e-8)


def test_discrete_alphas_keep_their_digits():
    from fractions import Fraction

    table = discrete_alphas("linear")
    exact = Fraction(1)
    for beta in np.linspace(1e-4, 0.02, 1000)[:50]:
        exact *= 1 - Fraction(float(beta))
    assert abs(float((Fraction(float(table[49])) - exact) / exact)) < 1e-15
    # 1 - alphas_cumprod at the first step is beta itself; float32 code loses it to 1.7e-4
    sigma = VPDiscrete(alphas_cumprod=table).schedule(np.array([0.0]))[1]
    assert sigma[0] ** 2 == pytest.approx(1e-4, rel=1e-11)


def test_noise_prediction_at_zero_signal_is_refused():
    with pytest.raises(ValueError, match="says nothing about x0"):
        convert("noise", "data", Level(1.0, 0.0, 1.0, 1.0))
    assert convert("v", "data", Level(1.0, 0.0, 1.0, 1.0)) == (0.0, -1.0, 0.0)


@pytest.mark.parametrize("table", [np.array([0.9]), np.array([0.5, 0.9]), np.array([1.5, 0.5]), np.zeros((2, 2))])
def test_bad_tables_are_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VPDiscrete(alphas_cumprod=table)


def test_unknown_prediction_lists_the_keys():
    with pytest.raises(ValueError, match="noise, data, v, flow, score"):
        convert("epsilon", "data", Level(0.5, 0.5, 0.5, 0.5))
