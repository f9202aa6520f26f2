"""Solvers that must agree with each other, closed forms, inversion, and tables executed by the step operation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from solvers_problems import Gaussian, Mixture, execute, lambda_levels
from solvers_textbook import trace_of

from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.solver_step import solver_step
from fastdiff.process import VE, Flow, Level, MeanReverting, TrigFlow, VPLinear
from fastdiff.solvers import SOLVERS, Noise, compile_table, solver
from fastdiff.solvers.exponential import Grid, Rule, psi, solve_moments

PROCESS, MIXTURE = VPLinear(), Mixture()
QUANTILES = np.array([0.05, 0.3, 0.6, 0.9])


def rows_of(name, levels, process=PROCESS, **options):
    made = solver(name, **options)
    return made.rows(levels, process, **made.options)


def same_rows(first, second, tolerance=2e-15):
    """Whether two lists of rows hand the same states to the model."""
    pairs = zip(trace_of(first), trace_of(second), strict=True)
    return all(np.abs(a - b).max() <= tolerance * np.abs(a).max() for a, b in pairs)


def final(rows, history):
    x = MIXTURE.quantile(rows[0].at, QUANTILES)
    return execute(rows, history, MIXTURE.denoise, x)


EQUAL = {
    "dpmpp-1 is ddim": (("dpmpp-1", {}), ("ddim", {})),
    "euler is ddim": (("euler", {}), ("ddim", {})),
    "bdia gamma 0 is ddim": (("bdia", {"gamma": 0.0}), ("ddim", {})),
    "unip-1 is ddim": (("unipc", {"order": 1, "disable_corrector": "all"}), ("ddim", {})),
    "sa p1 tau 0 is ddim": (("sa", {"order": 1, "corrector_order": 0, "tau": 0.0}), ("ddim", {})),
    "ddim eta 1 is sde-dpmpp-1": (("ddim", {"eta": 1.0}), ("sde-dpmpp-1", {})),
    "ddim eta 1 is euler-a": (("ddim", {"eta": 1.0}), ("euler-a", {})),
    "ddim eta .4 is euler-a": (("ddim", {"eta": 0.4}), ("euler-a", {"eta": 0.4})),
    "ddim eta 1 is ddpm": (("ddim", {"eta": 1.0}), ("ddpm", {})),
    "reference clip is ddim without a clamp": (("ddim", {"eta": 0.3, "clip": "reference"}), ("ddim", {"eta": 0.3})),
    "2m midpoint is unip-2 bh2": (
        ("dpmpp-2m", {"lower_order_below": 0}),
        ("unipc", {"disable_corrector": "all", "lower_order_final": False}),
    ),
    "2m midpoint noise is unip-2 bh2 noise": (
        ("dpm-2m", {"lower_order_below": 0}),
        ("unipc", {"disable_corrector": "all", "lower_order_final": False, "history": "noise"}),
    ),
    "2m heun is exp-adams 2": (
        ("dpmpp-2m", {"solver_type": "heun", "lower_order_below": 0}),
        ("exp-adams", {"order": 2}),
    ),
    "deis logrho is exp-adams noise": (
        ("deis", {"order": 3, "variable": "logrho"}),
        ("exp-adams", {"order": 3, "history": "noise"}),
    ),
    "lms is deis rho": (("lms", {}), ("deis", {"order": 4, "variable": "rho"})),
    "sde eta 0 is the ode": (("dpmpp-2m-sde", {"eta": 0.0}), ("dpmpp-2m", {"lower_order_below": 0})),
    "2m-sde eta 1 is sde-dpmpp-2m": (("dpmpp-2m-sde", {}), ("sde-dpmpp-2m", {"lower_order_below": 0})),
    "unipc bh1 and bh2 agree at order 3 after the start": (
        ("unipc", {"order": 3, "solver_type": "bh1", "disable_corrector": "all", "lower_order_final": False}),
        ("exp-adams", {"order": 3}),
    ),
}


@pytest.mark.parametrize("case", EQUAL)
def test_pairs_of_solvers_agree(case):
    (first, one), (second, two) = EQUAL[case]
    levels = lambda_levels(7)
    rows, others = rows_of(first, levels, **one), rows_of(second, levels, **two)
    if "after the start" in case:  # the second step has the special weight 1/2
        rows, others = ([row for row in part if row.step >= 2] for part in (rows, others))
        for a, b in zip(rows, others, strict=True):
            assert all(a.B[k] == pytest.approx(b.B[k], rel=1e-12, abs=1e-15) for k in b.B)
        return
    assert same_rows(rows, others)


def test_sa_is_the_sde_solver_with_tau_squared_equal_to_eta():
    levels = lambda_levels(6)
    options = {"tau": 0.8, "corrector_order": 0, "interval": (0.0, 2.0), "lower_order_final": False}
    for order, name, kind in ((2, "dpmpp-2m-sde", {"solver_type": "heun"}), (3, "dpmpp-3m-sde", {"third": "exact"})):
        rows = rows_of("sa", levels, order=order, **options)[:-1]  # its last step is deterministic
        assert same_rows(rows, rows_of(name, levels, eta=0.64, **kind)[:-1])


def test_first_order_solvers_agree_across_processes():
    """Flow Euler, Euler on VE and the TrigFlow rotation are DDIM in other coordinates: the same kappa, the same data."""
    kappa = np.array([6.0, 2.5, 1.1, 0.4, 0.15, 0.03])
    x0, noise = 0.4, -1.3

    def ends(process, name):
        levels = process.levels(process.time_of_lam(-np.log(kappa)))
        rows = rows_of(name, levels, process)
        start = levels[0].alpha * x0 + levels[0].sigma * noise
        model = lambda level, x: np.tanh(x / level.alpha) + 0.3 * level.kappa  # a function of (y, kappa) alone
        return execute(rows, SOLVERS[name].history, model, np.array([start])) / levels[-1].alpha

    want = ends(PROCESS, "ddim")
    others = [(Flow(), "flow-euler"), (Flow(), "ddim"), (VE(), "euler"), (VE(), "flow-euler"), (TrigFlow(), "ddim")]
    for process, name in others:
        np.testing.assert_allclose(ends(process, name), want, rtol=1e-13)
    t = TrigFlow().time_of_lam(-np.log(kappa))
    for row, a, b in zip(rows_of("ddim", TrigFlow().levels(t), TrigFlow()), t[:-1], t[1:], strict=True):
        # x' = cos(a - b) x - sin(a - b) F with F = (cos(a) x - x0) / sin(a)
        assert row.A == pytest.approx(np.cos(a - b) - np.sin(a - b) / np.tan(a), rel=1e-14)
        assert row.B[row.step] == pytest.approx(np.sin(a - b) / np.sin(a), rel=1e-14)


@pytest.mark.parametrize("z", [1e-6, 1e-3, 0.1, 0.5, 0.999, 1.0, 3.0, 8.0, -1e-4, -0.4, -1.0, -2.5, -8.0])
def test_moments_against_quadrature(z):
    v, w = np.polynomial.legendre.leggauss(60)
    v, w = 0.5 * (v + 1.0), 0.5 * w
    want = [z * np.sum(w * np.exp(-z * (1.0 - v)) * v**j) for j in range(5)]
    np.testing.assert_allclose(psi(z, 5), want, rtol=2e-13 if abs(z) <= 1 else 1e-13)


def test_moment_solve_on_uneven_nodes():
    nodes, random = [0.0, 1.0, -0.6, -1.9, -2.2], np.random.default_rng(0)
    moments = random.standard_normal(5)
    w = solve_moments(nodes, list(moments))
    np.testing.assert_allclose(np.vander(nodes, increasing=True).T @ w, moments, atol=1e-12)


def test_infinitely_distant_nodes_are_left_out():
    levels = Flow().levels([1.0, 0.9, 0.7, 0.5, 0.3])  # the first one has alpha = 0
    for name, order in (("exp-adams", 3), ("unipc", 3), ("dpmpp-3m", 3)):
        options = {"order": order} if name != "dpmpp-3m" else {"lower_order_below": 0}
        rows = rows_of(name, levels, Flow(), **options)
        assert rows[0].A == pytest.approx(0.9) and rows[0].B == {0: pytest.approx(0.1)}
        assert 0 not in rows[1].B and 0 not in rows[2].B  # no node at lambda = -infinity
        assert {1, 2} <= set(rows[2].B)


def test_repeated_nodes_count_once():
    levels = lambda_levels(3, 0.0, 3.0)
    repeated = Grid([levels[0], *levels], [0.0, 0.0, 1.0, 2.0, 3.0]).weights(2, 3, Rule())
    single = Grid(levels, [0.0, 1.0, 2.0, 3.0]).weights(1, 3, Rule())
    assert repeated == {k + 1: pytest.approx(value, rel=1e-15) for k, value in single.items()} and len(single) == 2


def test_fixed_adams_weights_are_exact_on_a_grid_uniform_in_kappa():
    kappa = np.linspace(4.0, 0.4, 10)
    levels = VE().levels(kappa)
    assert same_rows(rows_of("ipndm", levels, VE()), rows_of("lms", levels, VE()), 1e-14)
    assert not same_rows(rows_of("ipndm", lambda_levels(9)), rows_of("lms", lambda_levels(9)), 1e-3)


def test_noise_histories_invert_from_clean_data():
    """From x0 itself (lambda infinite, no usable node there) to noise, along the exact flow."""
    errors = []
    for n in (40, 80):
        levels = [PROCESS.zero_noise(), *lambda_levels(n - 1, -3.0, 3.0 + 0.02 * n)[::-1]]
        made = solver("exp-adams", order=2, history="noise")
        rows = compile_table(made, levels, PROCESS, "noise").rows
        x0 = MIXTURE.quantile(levels[0], QUANTILES)
        limit = levels[1]  # the noise that a model predicts at clean data is that of the first noisy level
        ghost = (MIXTURE.quantile(limit, QUANTILES) - limit.alpha * x0) / limit.sigma

        def denoise(level, x, ghost=ghost):
            return x - ghost if level.sigma == 0.0 else MIXTURE.denoise(level, x)

        h = {0: ghost}
        x = rows[0].A * x0 + rows[0].B[0] * ghost
        for r, row in enumerate(rows[1:], 1):
            h[r] = (x - row.at.alpha * denoise(row.at, x)) / row.at.sigma
            x = row.A * x + sum(v * h[k] for k, v in row.B.items())
            assert 0 not in row.B
        errors.append(np.abs(x - MIXTURE.quantile(levels[-1], QUANTILES)).max())
    assert errors[1] < 0.02 and errors[0] / errors[1] > 2.5


def test_third_order_needs_the_full_second_difference():
    """The published third-order weights halve it, and measure second order."""
    errors = {}
    for third in ("compat", "exact"):
        for n in (160, 320):
            rows = rows_of("dpmpp-3m", lambda_levels(n), third=third)
            errors[third, n] = np.abs(final(rows, "data") - MIXTURE.quantile(rows[-1].to, QUANTILES)).max()
    assert errors["compat", 320] > 5.0 * errors["exact", 320]
    assert errors["compat", 160] / errors["compat", 320] == pytest.approx(4.0, abs=0.4)


def test_the_three_meanings_of_eta():
    """DDIM scales the noise, k-diffusion the exponent, SA squares; they agree at 0 and 1."""
    levels = lambda_levels(4)
    for r, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        h = to.lam - at.lam
        ddim = rows_of("ddim", levels, eta=0.3)[r].noise[0].scale
        kdiff = rows_of("dpmpp-2m-sde", levels, eta=0.3)[r].noise[0].scale
        assert ddim**2 == pytest.approx(0.09 * to.sigma**2 * (1.0 - np.exp(-2.0 * h)), rel=1e-13)
        assert kdiff**2 == pytest.approx(to.sigma**2 * (1.0 - np.exp(-0.6 * h)), rel=1e-13)
        if r + 1 < len(levels) - 1:
            tau = rows_of("sa", levels, tau=0.3**0.5, interval=(0.0, 2.0))[r].noise[0].scale
            assert tau == pytest.approx(kdiff, rel=1e-13)


def test_predictor_and_corrector_of_sa_share_their_noise():
    """Counting the corrector's noise as a second, independent one gives another variance than the compiled rows."""
    made, levels, gaussian = solver("sa", interval=(0.0, 2.0)), lambda_levels(20), Gaussian()
    rows = made.rows(levels, PROCESS, **made.options)
    want = gaussian.marginal(levels[-1])[1]
    assert len({noise.step for row in rows for noise in row.noise}) == len(rows) - 1
    assert abs(gaussian.final_moments(rows, "data")[1] - want) < 4e-3
    redrawn = gaussian.final_moments(_redrawn(rows), "data")[1]
    assert abs(redrawn - want) > 0.05


def _redrawn(rows):
    """x^c with noise of its own: the state that the corrector leaves differs from x^p by C (z' - z) as well."""
    out = []
    for r, row in enumerate(rows):
        before = rows[r - 1].noise if r else ()
        extra = tuple(
            noise for n in before for noise in (Noise(-row.A * n.scale, n.step), Noise(row.A * n.scale, n.step, 2))
        )
        out.append(replace(row, noise=(*row.noise, *extra)))
    return out


@pytest.mark.parametrize("gamma, n, limit", [(1.0, 20, 1e-12), (1.0, 80, 1e-12), (0.9, 20, 1e-11), (0.5, 10, 1e-9)])
def test_bdia_is_inverted_by_its_own_rows(gamma, n, limit):
    """Forward, then the rows of the reversed levels from the last two states: the start comes back."""
    levels = lambda_levels(n)
    forward = rows_of("bdia", levels, gamma=gamma)
    states = [MIXTURE.quantile(levels[0], QUANTILES)]
    for r in range(n):
        states.append(execute(forward[: r + 1], "data", MIXTURE.denoise, states[0]))
    back = rows_of("bdia", levels[::-1], gamma=gamma)
    restored = execute(back, "data", MIXTURE.denoise, states[-1], exact=lambda _: states[-2], exact_steps=1)
    assert np.abs(restored - states[0]).max() <= limit


def test_ddim_inversion_is_first_order():
    errors = []
    for n in (40, 80):
        levels = lambda_levels(n)
        x = execute(rows_of("ddim", levels), "data", MIXTURE.denoise, MIXTURE.quantile(levels[0], QUANTILES))
        back = execute(rows_of("ddim", levels[::-1]), "data", MIXTURE.denoise, x)
        errors.append(np.abs(back - MIXTURE.quantile(levels[0], QUANTILES)).max())
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_step_operation_executes_the_rows(name):
    """Slots, columns and noise keys: the torch reference on the compiled table equals the rows executed in numpy."""
    made, n = SOLVERS[name], 6
    process = PROCESS
    table = compile_table(made, lambda_levels(n, process=process), process, "noise")
    model = lambda level, x: np.tanh(0.7 * x + 0.2) - 0.1 * level.time  # noise prediction

    def data(level, x):
        return (x - level.sigma * model(level, x)) / level.alpha

    x = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64).reshape(1, 5)
    seed = torch.tensor([11])

    def noise(step, stream):
        key = [torch.tensor([value], dtype=torch.int32) for value in (step, stream)]
        return philox_normal.reference(seed, *key, 5).double().numpy().reshape(5)

    want = execute(table.rows, made.history, data, x[0].numpy(), noise)
    history = torch.full((table.slots, 1, 5), torch.nan, dtype=torch.float64)
    coef, meta = torch.from_numpy(table.coef), torch.from_numpy(table.meta)
    rows = torch.arange(len(table), dtype=torch.int32).reshape(-1, 1)
    tick, unused = torch.zeros(1, dtype=torch.int32), torch.empty(0, 1, 5, dtype=torch.float64)
    for row in table.rows:
        m = torch.from_numpy(model(row.at, x.numpy()))
        x, history, _, tick = solver_step.reference(x, history, unused, tick, [m], None, None, coef, meta, rows, seed)
    np.testing.assert_allclose(x[0].numpy(), want, rtol=1e-10, atol=1e-12)


def test_levels_of_zero_noise_or_rising_noise_are_refused_clearly():
    clean = Level(0.0, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="cannot start at zero noise"):
        compile_table(SOLVERS["ddim"], [clean, *PROCESS.levels([0.1, 0.5])], PROCESS)
    with pytest.raises(ValueError, match="monotonic"):
        compile_table(SOLVERS["ddim"], PROCESS.levels([0.5, 0.5]), PROCESS)


MEAN_WEIGHTS = {  # published weights of the known endpoint in mean-reverting samplers, from alpha, sigma, alpha', sigma', h
    ("dpmpp-2m",): lambda a, s, a2, s2, h: 1.0 - s2 / s + s2 / s * a - a2,
    ("dpm-2m",): lambda a, s, a2, s2, h: 1.0 - a2 / a,
    ("sde-dpmpp-2m",): lambda a, s, a2, s2, h: 1.0 - a2 / a * np.exp(-2 * h) - a2 * (1.0 - np.exp(-2 * h)),
    ("sa", ("history", "noise"), ("interval", (0.0, 1.0))): lambda a, s, a2, s2, h: 1.0 - a2 / a,
}


@pytest.mark.parametrize("key", MEAN_WEIGHTS, ids=str)
def test_mean_reverting_weights(key):
    process = MeanReverting(sigma_max=0.4)
    levels = process.levels(process.time_of_lam(np.linspace(-2.0, 2.5, 7)))
    table = compile_table(solver(key[0], **dict(key[1:])), levels, process, "noise")
    for row, at, to in zip(table.rows, levels[:-1], levels[1:], strict=True):
        want = MEAN_WEIGHTS[key](at.alpha, at.sigma, to.alpha, to.sigma, to.lam - at.lam)
        assert row.D == pytest.approx(want, rel=1e-12)


def test_rescaled_sa_moves_the_published_amount_between_two_predictions():
    levels, q = lambda_levels(6), 2.0
    options = {"order": 2, "interval": (0.0, 2.0)}
    for corrector in (0, 2):
        plain = rows_of("sa", levels, corrector_order=corrector, **options)
        scaled = rows_of("sa", levels, corrector_order=corrector, rescale=True, **options)
        for r in range(1, 4):
            at, to = levels[r], levels[r + 1]
            h = to.lam - at.lam
            moment = h**2 / 2 - (q * h - 1.0 + np.exp(-q * h)) / q**2
            change = {r: q * to.alpha * moment / (at.lam - levels[r - 1].lam)}
            change[r - 1] = -change[r]
            if corrector:  # the last step's corrector less its predictor, times A
                moment_before = (levels[r].lam - levels[r - 1].lam) ** 2 / 2 - (q * h - 1.0 + np.exp(-q * h)) / q**2
                new = q * at.alpha * moment_before / h
                old = new if r > 1 else 0.0  # the first predictor has one term: nothing was rescaled
                for k, value in ((r, new), (r - 1, -new - old), (r - 2, old)):
                    change[k] = change.get(k, 0.0) + plain[r].A * value
            for k, value in change.items():
                got = scaled[r].B.get(k, 0.0) - plain[r].B.get(k, 0.0)
                assert got == pytest.approx(value, rel=1e-9, abs=1e-14)
