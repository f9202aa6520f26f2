"""Multistage solvers: rows against textbook loops with two states, orders of convergence, exact variances."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest

from fastdiff.process import VE, Flow, VPLinear
from fastdiff.solvers import SOLVERS, ancestral, compile_table, consistency, heun, singlestep
from fastdiff.solvers.singlestep import order_plan
from fastdiff.solvers.table import check_rows

CENTERS, WEIGHTS, SPREAD = np.array([-1.2, 0.4, 1.5]), np.array([0.3, 0.45, 0.25]), 0.3


def denoise(y, kappa):
    """E[x0 | y = x0 + kappa noise] for a mixture of three Gaussians."""
    variance = SPREAD**2 + kappa**2
    log = np.log(WEIGHTS) - 0.5 * (y[:, None] - CENTERS) ** 2 / variance
    p = np.exp(log - log.max(axis=1, keepdims=True))
    means = CENTERS + SPREAD**2 / variance * (y[:, None] - CENTERS)
    return (p * means).sum(1) / p.sum(1)


def value(level, x, history):
    """The exact prediction of a history type at a level."""
    data = denoise(x / level.alpha, level.kappa)
    noise = (x - level.alpha * data) / level.sigma
    return {"data": data, "noise": noise, "flow": level.alpha_rate * data + level.sigma_rate * noise}[history]


def run(rows, x, history="data", draws=None, model=value):
    """Executes rows as the definition says, with every prediction and state kept."""
    states, h = [], []
    for r, row in enumerate(rows):
        states.append(x)
        h.append(model(row.at, x, history))
        x = row.A * x + sum(v * h[k] for k, v in row.B.items()) + sum(v * states[k] for k, v in row.X.items())
        x = x + row.R * h[r] + sum(n.scale * draws[n.step, n.stream] for n in row.noise)
    return x


def karras(n, sigma_min=0.02, sigma_max=8.0, rho=7.0):
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append(np.linspace(*ends, n) ** rho, 0.0)


def levels_of(process, kappas):
    t = [float(process.time_of_lam(-math.log(k))) if k > 0 else 0.0 for k in kappas]
    return [
        *process.levels([v for v, k in zip(t, kappas, strict=True) if k > 0]),
        *([process.zero_noise()] if kappas[-1] == 0 else []),
    ]


def derivative(y, kappa):
    return (y - denoise(y, kappa)) / kappa


def churned(s, churn, window):
    """Noise levels raised by churn where they lie in the window (Karras et al. 2022, alg. 2)."""
    gamma = min(churn / (len(s) - 1), math.sqrt(2) - 1)
    return [level * (1 + gamma * (window[0] <= level <= window[1])) for level in s]


def textbook_heun(y, s, churn=0.0, s_noise=1.0, draws=None, middle="end", window=(0.0, math.inf)):
    for i, hat in enumerate(churned(s, churn, window)[:-1]):
        if hat > s[i] and i > 0:
            y = y + math.sqrt(hat**2 - s[i] ** 2) * s_noise * draws[i - 1, 2]
        d = derivative(y, hat)
        if s[i + 1] == 0:
            y = y + (s[i + 1] - hat) * d
        elif middle == "end":
            e = y + (s[i + 1] - hat) * d
            y = y + (s[i + 1] - hat) * 0.5 * (d + derivative(e, s[i + 1]))
        else:
            m = math.sqrt(hat * s[i + 1])
            y = y + (s[i + 1] - hat) * derivative(y + (m - hat) * d, m)
    return y


def split(a, b):
    up = min(b, math.sqrt(b**2 * (a**2 - b**2) / a**2))
    return math.sqrt(b**2 - up**2), up


def textbook_ancestral(name, y, s, draws):
    for i, (a, b) in enumerate(zip(s[:-1], s[1:], strict=True)):
        down, up = split(a, b)
        D = denoise(y, a)
        if b == 0:
            y = D
        elif name == "dpm2-a":
            m = math.sqrt(a * down)
            half = y + (m - a) * (y - D) / a
            y = y + (down - a) * derivative(half, m) + up * draws[i, 1]
        elif name == "dpmpp-2s-a":
            h = math.log(a / down)
            m = a * math.exp(-0.5 * h)
            half = m / a * y - math.expm1(-0.5 * h) * D
            y = down / a * y - math.expm1(-h) * denoise(half, m) + up * draws[i, 1]
        else:  # dpmpp-sde
            m = math.sqrt(a * b)
            down1, up1 = split(a, m)
            half = down1 / a * y + (1 - down1 / a) * D + up1 * draws[i, 1]
            rho = math.sqrt((a - m) / (a - b))
            z = rho * draws[i, 1] + math.sqrt(1 - rho**2) * draws[i, 2]
            y = down / a * y + (1 - down / a) * denoise(half, m) + up * z
    return y


def draws_for(n, size):
    random = np.random.default_rng(3)
    return {(i, k): random.standard_normal(size) for i in range(n) for k in (1, 2)}


MINE = [solver.name for module in (ancestral, consistency, heun, singlestep) for solver in module.SOLVERS]
PROCESSES = {"ve": VE(edm=False), "vp": VPLinear(), "flow": Flow()}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("churn, window", [(0.0, (0.0, math.inf)), (4.0, (0.0, math.inf)), (4.0, (0.3, 5.0))])
@pytest.mark.parametrize("name, middle", [("heun", "end"), ("dpm2", "log")])
def test_one_slot_heun_equals_the_textbook_with_two_states(process, churn, window, name, middle):
    process, s = PROCESSES[process], karras(12)
    levels, draws = levels_of(process, s), draws_for(12, 5)
    solver = SOLVERS[name].with_options(s_churn=churn, s_noise=1.01, s_min=window[0], s_max=window[1])
    rows = solver.rows(levels, process, **solver.options)
    y = churned(s, churn, window)[0] * np.linspace(-1.5, 1.2, 5)
    got = run(rows, y * rows[0].at.alpha, draws=draws)
    want = textbook_heun(y, s, churn, 1.01, draws, middle, window)
    assert len(rows) == 2 * 12 - 1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["dpm2-a", "dpmpp-2s-a", "dpmpp-sde"])
def test_ancestral_solvers_equal_the_textbook(process, name):
    process, s = PROCESSES[process], karras(12)
    levels, draws = levels_of(process, s), draws_for(12, 5)
    rows = SOLVERS[name].rows(levels, process, **SOLVERS[name].options)
    y = s[0] * np.linspace(-1.5, 1.2, 5)
    got = run(rows, y * levels[0].alpha, draws=draws)
    np.testing.assert_allclose(got, textbook_ancestral(name, y, s, draws), rtol=0, atol=1e-11)


def textbook_single(x, levels, process, order, data, taylor):
    """Lu et al. 2022, alg. 1 and 2 and their data-prediction twins, one step after the other."""
    for at, to in zip(levels[:-1], levels[1:], strict=True):
        x = textbook_step(x, at, to, process, order, data, taylor)
    return x


def textbook_step(x, at, to, process, order, data, taylor):
    h, sign, history = to.lam - at.lam, (-1.0 if data else 1.0), ("data" if data else "noise")
    keep = lambda e: e.sigma / at.sigma if data else e.alpha / at.alpha
    scale = lambda e: e.alpha if data else e.sigma
    node = lambda r: process.levels([float(process.time_of_lam(at.lam + r * h))])[0]
    p1 = lambda z: math.expm1(sign * z)
    p2 = lambda z: p1(z) / z - sign
    p3 = lambda z: p2(z) / z - 0.5
    e0 = value(at, x, history)
    first = lambda e, z: keep(e) * x - scale(e) * p1(z) * e0
    if order == 1:
        return first(to, h)
    r1 = 1 / order
    d1 = value(node(r1), first(node(r1), r1 * h), history) - e0
    if order == 2:
        weight = -sign * p2(h) / r1 if taylor else -p1(h) / (2 * r1)
        return first(to, h) + scale(to) * weight * d1
    r2 = 2 / 3
    d2 = value(node(r2), first(node(r2), r2 * h) - sign * r2 / r1 * scale(node(r2)) * p2(r2 * h) * d1, history) - e0
    if not taylor:
        return first(to, h) - sign * scale(to) * p2(h) / r2 * d2
    a, b = d1 / r1, d2 / r2
    slope, curve = (r2 * a - r1 * b) / (r2 - r1), 2 * (b - a) / (r2 - r1)
    return first(to, h) - scale(to) * (sign * p2(h) * slope + p3(h) * curve)


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("name", ["dpm-1s", "dpm-2s", "dpm-3s", "dpmpp-2s", "dpmpp-3s"])
def test_single_step_rows_equal_the_papers_formulas(process, solver_type, name):
    process = PROCESSES[process]
    levels = levels_of(process, karras(7)[:-1])
    solver = SOLVERS[name]
    if "solver_type" in solver.options:
        solver = solver.with_options(solver_type=solver_type)
    rows = solver.rows(levels, process, **solver.options)
    x = levels[0].sigma * np.linspace(-1.4, 1.3, 5)
    want = textbook_single(x, levels, process, solver.order, solver.history == "data", solver_type == "heun")
    np.testing.assert_allclose(run(rows, x, solver.history), want, rtol=0, atol=1e-11)


PLAIN = ["heun", "dpm2", "dpm-1s", "flow-heun", "flow-midpoint"]
TYPED = [(name, t) for name in ("dpm-2s", "dpm-3s", "dpmpp-2s", "dpmpp-3s", "dpm-fast") for t in ("midpoint", "heun")]


@functools.cache
def nearly_exact(process):
    levels = levels_of(process, np.exp(np.linspace(math.log(5.0), math.log(0.1), 401)))
    return run(SOLVERS["dpmpp-3s"].rows(levels, process), START * levels[0].sigma)


START = np.linspace(-1.5, 1.4, 7)


@pytest.mark.parametrize("name, solver_type", [*((name, None) for name in PLAIN), *TYPED])
def test_deterministic_solvers_converge_with_their_order(name, solver_type):
    solver = SOLVERS[name].with_options(**({"solver_type": solver_type} if solver_type else {}))
    process = Flow() if name.startswith("flow") else VPLinear()
    kappas = lambda n: np.exp(np.linspace(math.log(5.0), math.log(0.1), n + 1))

    def end(n):
        levels = levels_of(process, kappas(n))
        return run(solver.rows(levels, process, **solver.options), START * levels[0].sigma, solver.history)

    steps = [33, 66, 132] if name == "dpm-fast" else [16, 32, 64]
    errors = [np.abs(end(n) - nearly_exact(process)).max() for n in steps]
    assert math.log2(errors[1] / errors[2]) > solver.order - 0.3, errors


def spread_of(rows, variance):
    """Exact variance of the result on N(0, variance) data: the coefficients of x_T and of every noise are propagated."""
    gain = lambda level: level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)  # data = gain x
    keys = sorted({(n.step, n.stream) for row in rows for n in row.noise})
    start = math.sqrt(rows[0].at.alpha ** 2 * variance + rows[0].at.sigma ** 2)
    x0 = np.eye(1 + len(keys))[0] * start
    draws = {key: np.eye(1 + len(keys))[1 + i] for i, key in enumerate(keys)}
    return (run(rows, x0, draws=draws, model=lambda level, x, history: gain(level) * x) ** 2).sum()


def with_own_noise(row):
    """The row with all its noise drawn from the stream of its last term."""
    if not row.noise:
        return row
    return replace(row, noise=(replace(row.noise[-1], scale=math.hypot(*(n.scale for n in row.noise))),))


def test_weak_orders_and_the_correlated_noise_of_dpmpp_sde():
    process = VPLinear(beta_max=40.0)
    variance = 0.25

    def error(name, n, independent=False):
        levels = levels_of(process, np.exp(np.linspace(3.0, -3.0, n + 1)))
        rows = SOLVERS[name].rows(levels, process, **SOLVERS[name].options)
        if independent:
            rows = [with_own_noise(row) for row in rows]
        return abs(spread_of(rows, variance) - levels[-1].alpha ** 2 * variance - levels[-1].sigma ** 2)

    # the specification's reference numbers for N(0.7, 0.5^2), lambda in [-3, 3], 20 steps
    assert error("dpmpp-sde", 20) == pytest.approx(4.2e-3, rel=0.05)
    assert error("dpmpp-sde", 20, independent=True) == pytest.approx(5.4e-2, rel=0.05)
    assert error("dpmpp-2s-a", 20) == pytest.approx(9.8e-3, rel=0.05)
    for name in ("dpmpp-sde", "dpmpp-2s-a"):
        assert math.log2(error(name, 80) / error(name, 160)) > 1.8


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", MINE)
def test_rows_keep_their_invariants_and_end_at_zero_noise(process, name):
    process, solver = PROCESSES[process], SOLVERS[name]
    table = compile_table(solver, levels_of(process, karras(9)), process, "data")
    assert check_rows(table.rows, solver.exact, solver.history) < 1e-10
    assert np.isfinite(table.coef[:, 8:]).all() and table.end.sigma == 0.0


def test_flow_steps_are_exact_on_constant_predictions():
    for name in ("flow-heun", "flow-midpoint"):
        rows = compile_table(SOLVERS[name], Flow().levels([1.0, 0.7, 0.4, 0.1, 0.0]), Flow(), "flow").rows
        assert check_rows(rows, frozenset({"data", "noise"}), "flow") < 1e-12


def test_order_plans_use_every_call():
    for order in (1, 2, 3):
        assert all(sum(order_plan(calls, order)) == calls for calls in range(1, 60))
    assert [order_plan(n, 3) for n in (5, 6, 7, 12)] == [[3, 2], [3, 2, 1], [3, 3, 1], [3, 3, 3, 2, 1]]


@pytest.mark.parametrize(
    "name, options",
    [
        ("cm", {}),
        ("ctm", {"gamma": 0.0}),
        ("ctm", {"gamma": 0.5}),
        ("ctm", {"gamma": 1.0}),
        ("lcm", {}),
        ("tcd", {"gamma": 0.3}),
    ],
)
def test_consistency_steps_keep_the_marginal_of_known_data(name, options):
    """With the exact data estimate (a point mass at 0.7) every renoising rule must give N(alpha 0.7, sigma^2) at each level."""
    process = VPLinear()
    levels = levels_of(process, karras(5)[: -1 if name in ("cm", "ctm") else None])
    solver = SOLVERS[name].with_options(**options)
    rows = solver.rows(levels, process, **solver.options)
    mean, var = levels[0].alpha * 0.7, levels[0].sigma ** 2
    for row in rows:
        k = next(iter(row.B))
        mean, var = row.A * mean + row.B[k] * 0.7, row.A**2 * var + sum(n.scale**2 for n in row.noise)
        wanted = row.to.sigma**2
        if name == "cm":
            wanted -= (row.to.alpha * levels[-1].kappa) ** 2  # a consistency model's data stands at sigma_min
        if name == "ctm" and row is rows[-1]:
            continue
        assert mean == pytest.approx(row.to.alpha * 0.7, abs=1e-12) and var == pytest.approx(wanted, abs=1e-12)
