"""Certificates and the exact problems behind them: closed forms against quadrature and integration, faults found."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import norm

from fastdiff.process import PREDICTIONS, VE, Flow, TrigFlow, VPLinear
from fastdiff.sampler import Sampler
from fastdiff.solvers import SOLVERS, verify
from fastdiff.solvers.exact import GaussianMixture, gaussian
from fastdiff.solvers.row import Row
from fastdiff.solvers.verify import _certify

MIXTURE = GaussianMixture()


def test_denoiser_equals_quadrature_over_the_posterior():
    level = VPLinear().levels([0.4])[0]
    x0 = np.linspace(-6.0, 6.0, 20001)
    prior = sum(
        w * norm.pdf(x0, m, s) for m, s, w in zip(MIXTURE.means, MIXTURE.deviations, MIXTURE.weights, strict=True)
    )
    for x in (-1.5, -0.2, 0.9):
        posterior = prior * norm.pdf(x, level.alpha * x0, level.sigma)
        want = (posterior * x0).sum() / posterior.sum()
        assert float(MIXTURE.denoise(level, torch.tensor([x], dtype=torch.float64))) == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("data", [MIXTURE, gaussian()])
def test_flow_equals_numerical_integration_of_the_probability_flow(data):
    process, x = VE(edm=False), torch.tensor([-2.0, 0.3, 1.9], dtype=torch.float64)
    at, to = process.levels([2.0, 0.1])

    def slope(sigma, y):
        level = process.levels([sigma])[0]
        return (y - data.denoise(level, torch.from_numpy(y)).numpy()) / sigma

    want = solve_ivp(slope, (2.0, 0.1), x.numpy(), rtol=1e-11, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(data.flow(at, to, x).numpy(), want, atol=1e-8)


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("process", [VPLinear(), VE(), Flow(), TrigFlow()], ids=lambda p: type(p).__name__)
def test_exact_network_samples_the_flow_for_every_prediction_type(process, prediction):
    """The same samples whatever the network returns; a third-order solver lands on the closed form."""
    first = {VE: 5.0, TrigFlow: 1.4}.get(type(process), 0.9)
    times = (np.geomspace if isinstance(process, VE) else np.linspace)(first, 0.1, 33)
    sampler = Sampler(
        MIXTURE.net(process, prediction), prediction=prediction, process=process, model_dtype=torch.float64
    )
    levels = process.levels(times)
    x = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)[None] * levels[0].sigma
    table = verify.compile_table(SOLVERS["dpmpp-3s"], levels, process, prediction)
    got = sampler.sample(x=x.clone(), solver=table, seed=[0], dtype=torch.float64)
    want = MIXTURE.flow(levels[0], levels[-1], x)
    assert float((got - want).abs().max()) < 2e-4


def test_certificates_pass_for_honest_solvers():
    for record in verify.verify(["ddim", "unipc", "dpmpp-sde", "flow-heun", "edm", "ctm"]):
        assert record.passed, str(record)
        assert record.invariant < 1e-9 and str(record).startswith("ok")


@pytest.mark.slow
def test_every_solver_passes():
    failed = [str(record) for record in verify.verify("all") if not record.passed]
    assert not failed


def test_a_wrong_coefficient_is_found_and_said():
    """A solver that claims the invariants of 2M but uses weights that are off by 1 % of their difference."""
    honest = SOLVERS["dpmpp-2m"]

    def rows(levels, process, **options) -> list[Row]:
        made = honest.rows(levels, process, **options)
        wrong = lambda r, row: replace(row, B={r: row.B[r] - 0.02, r - 1: row.B[r - 1] + 0.02}) if r else row
        return [wrong(r, row) if len(row.B) == 2 else row for r, row in enumerate(made)]

    record = _certify(replace(honest, rows=rows))
    assert not record.passed and "converges with order" in record.message and str(record).startswith("FAIL")


def test_parity_with_diffusers():
    pytest.importorskip("diffusers", reason="diffusers is not installed; it is what these tables are compared with")
    records = verify.verify(["ddim", "dpmpp-2m", "unipc"], against="diffusers")
    assert len(records) == 5 and all(record.passed and record.difference < 1e-12 for record in records)
    assert verify.verify(["bdia"], against="diffusers") == []


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="known are exact, diffusers"):
        verify.verify("all", against="truth")
    with pytest.raises(ValueError, match="unknown solver"):
        verify.verify(["no-such"])
