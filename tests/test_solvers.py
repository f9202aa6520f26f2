"""Every solver of SOLVERS: row invariants, measured order, exact means and moments, last and first steps."""

import numpy as np
import pytest
from solvers_problems import Gaussian, Mixture, execute, lambda_levels, slopes

from fastdiff.process import VE, Flow, MeanReverting, SubVP, TrigFlow, VPDiscrete, VPLinear
from fastdiff.solvers import SOLVERS, ancestral, compile_table, consistency, heun, singlestep, solver
from fastdiff.solvers.invariants import check_rows
from fastdiff.solvers.spacing import levels
from fastdiff.solvers.table import carry_mean

PROCESS, QUANTILES = VPLinear(), np.array([0.05, 0.2, 0.45, 0.6, 0.8, 0.97])
FULL = {"lower_order_final": False}  # a lower last order hides the order of the others
# deterministic variants beyond each solver's defaults, for the order test
VARIANTS = [
    ("dpmpp-2m", {"solver_type": "heun"}),
    ("dpm-2m", {"solver_type": "heun"}),
    ("dpm-3m", {"third": "exact"}),
    ("dpmpp-3m", {"third": "exact"}),
    ("dpmpp-3m-sde", {"third": "exact", "eta": 0.0}),
    *[("exp-adams", {"order": p, "history": h}) for p in (1, 2, 3, 4) for h in ("data", "noise")],
    *[
        ("unipc", {"order": p, "solver_type": b, "history": h, **FULL})
        for p in (1, 2, 3, 4)
        for b in ("bh1", "bh2")
        for h in ("data", "noise")
    ],
    *[("unipc", {"order": p, "disable_corrector": "all", **FULL}) for p in (1, 2, 3)],
    *[
        ("sa", {"tau": 0.0, "order": p, "corrector_order": c, "history": h, **FULL})
        for p, c in ((1, 0), (2, 0), (3, 0), (1, 1), (3, 1), (1, 2), (2, 3), (3, 4))
        for h in ("data", "noise")
    ],
    *[("deis", {"order": p, "variable": v}) for p in (1, 2, 3, 4) for v in ("t", "rho", "logrho")],
    *[("lms", {"order": p}) for p in (1, 2, 3)],
    *[("exp-adams", {"order": p, "history": h, "start": "single"}) for p in (3, 4) for h in ("data", "noise")],
    ("bdia", {"gamma": 0.5}),
    ("ddim", {"clip": "reference"}),
]
STOCHASTIC = [
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("ddpm", {"variance": "large"}),
    ("sde-dpmpp-2m", {"solver_type": "heun"}),
    ("dpmpp-2m-sde", {"eta": 0.5}),
    ("dpmpp-3m-sde", {"third": "exact"}),
    *[
        ("sa", {"tau": tau, "order": p, "corrector_order": c, "interval": (0.0, 2.0), "history": h, **FULL})
        for tau, p, c, h in (
            (1.0, 1, 0, "data"),
            (1.0, 2, 0, "data"),
            (1.0, 3, 0, "data"),
            (0.6, 1, 2, "data"),
            (1.0, 3, 4, "data"),
            (1.0, 2, 2, "noise"),
            (0.6, 3, 4, "noise"),
        )
    ],
]
DEFAULTS = [(name, {}) for name in SOLVERS]
# solvers of several calls per step: test_multistage.py measures their orders against textbook loops
MULTISTAGE = {made.name for module in (ancestral, consistency, heun, singlestep) for made in module.SOLVERS}
ONE_CALL = [(name, {}) for name in SOLVERS if name not in MULTISTAGE]
PROCESSES = (
    SubVP(),
    VPDiscrete(),
    VE(),
    Flow(),
    TrigFlow(),
    MeanReverting(sigma_max=0.7),
)
ids = lambda value: value if isinstance(value, str) else type(value).__name__ if not isinstance(value, dict) else None


def rows_of(made, n, **kwargs):
    grid = lambda_levels(n, **kwargs)
    return grid, made.rows(grid, PROCESS, **made.options)


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
@pytest.mark.parametrize("name, options", DEFAULTS + VARIANTS + STOCHASTIC, ids=ids)
def test_row_invariants_hold_to_rounding(name, options, process):
    made = solver(name, **options)
    spacing = "uniform-lambda" if made.spacing in ("quadratic", "uniform") else made.spacing
    for steps in (1, 2, 7):
        rows = compile_table(made, levels(process, steps, spacing, made.final), process, "v").rows
        assert check_rows(rows, made.exact, made.history) <= 1e-12


def flow_errors(made, steps):
    """Errors against the exact flow of the mixture; multistep solvers start on the exact trajectory."""
    mixture, out = Mixture(), []
    for n in steps:
        grid, rows = rows_of(made, n)
        single_call = len(rows) == n and not any(row.X for row in rows)
        x = execute(
            rows,
            made.history,
            mixture.denoise,
            mixture.quantile(grid[0], QUANTILES),
            exact=lambda level: mixture.quantile(level, QUANTILES),
            exact_steps=made.order if single_call else 0,
        )
        out.append(np.sqrt(np.mean((x - mixture.quantile(grid[-1], QUANTILES)) ** 2)))
    return out


def is_stochastic(made):
    return any(row.noise for row in rows_of(made, 4)[1])


@pytest.mark.parametrize("name, options", ONE_CALL + VARIANTS, ids=ids)
def test_deterministic_order(name, options):
    made = solver(name, **({**FULL, **options} if "lower_order_final" in SOLVERS[name].options else options))
    if made.order == 0 or is_stochastic(made):
        return
    # fifth order meets the exact start's own error at 1e-10: coarser steps, a little more slack
    steps, slack = ((40, 80), 0.25) if made.order > 4 else ((160, 320), 0.2)
    assert slopes(flow_errors(made, steps))[0] == pytest.approx(made.order, abs=slack)


@pytest.mark.parametrize("name, options", ONE_CALL + STOCHASTIC, ids=ids)
def test_weak_order_from_exact_moments(name, options):
    made = solver(name, **({**FULL, **options} if "lower_order_final" in SOLVERS[name].options else options))
    if made.order == 0 or not is_stochastic(made):
        return
    errors = [Gaussian().errors(rows_of(made, n)[1], made.history) for n in (160, 320)]
    assert slopes([variance for _, variance in errors])[0] == pytest.approx(made.order, abs=0.2)
    assert max(mean for mean, _ in errors) <= 1e-13


@pytest.mark.parametrize("name, options", DEFAULTS + VARIANTS + STOCHASTIC, ids=ids)
def test_gaussian_means_are_exact_at_any_step_count(name, options):
    made = solver(name, **options)
    if "data" not in made.exact or "noise" not in made.exact:
        return
    for n in (1, 2, 3, 5):
        # noise predictions at sigma = 0.0025 carry rounding errors 400 times larger, which a long step multiplies by 150
        for low, high, tolerance in ((-3.0, 3.0, 1e-13), (-5.0, 6.0, 1e-11)):
            _, rows = rows_of(made, n, low=low, high=high)
            assert Gaussian().errors(rows, made.history)[0] <= tolerance


# variance errors for N(0.7, 0.5^2) after 20 steps uniform in lambda from -3 to 3, from an independent float64 script
GOLDEN = {
    ("ddim",): 3.47e-2,
    ("ddim", ("eta", 0.5)): 4.08e-2,
    ("ddim", ("eta", 1.0)): 6.20e-2,
    ("ddpm",): 6.20e-2,
    ("euler-a",): 6.20e-2,
    ("sde-dpmpp-1",): 6.20e-2,
    ("sde-dpmpp-2m",): 6.12e-3,
    ("sde-dpmpp-2m", ("solver_type", "heun")): 1.55e-2,
    ("dpmpp-3m-sde",): 6.85e-3,
    ("dpmpp-3m-sde", ("third", "exact")): 4.47e-3,
    ("dpmpp-2s-a",): 9.78e-3,
    ("dpmpp-sde",): 4.21e-3,
}


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_variance_errors(key):
    made = solver(key[0], **dict(key[1:]))
    error = Gaussian().errors(rows_of(made, 20)[1], made.history)[1]
    assert error == pytest.approx(GOLDEN[key], rel=2e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_to_zero_noise_is_finite_and_keeps_constant_data(name):
    made = SOLVERS[name]
    for process in (PROCESS, VE(), Flow(t_max=0.97), VPDiscrete()):
        for steps in (1, 2, 5):
            table = compile_table(made, levels(process, steps, "uniform-lambda", "zero"), process, "v")
            last = table.rows[-1]
            assert last.to.sigma == 0.0 and np.isfinite(table.coef[-1, 8:]).all()
            assert not any(noise.scale for noise in last.noise)
            if made.history == "data" and name != "bdia":  # order 1: the state is the prediction
                assert last.A == 0.0 and last.B[len(table) - 1] == pytest.approx(1.0, abs=1e-15)
                assert sum(abs(v) for k, v in last.B.items() if k != len(table) - 1) == 0.0


def test_options_that_matter_only_at_the_end():
    grid = levels(PROCESS, 4, "uniform-lambda")
    large = solver("ddpm", variance="large")
    assert large.rows(grid, PROCESS, **large.options)[-1].noise == ()
    for variable, terms in (("t", 1), ("logrho", 1), ("rho", 3)):
        made = solver("deis", order=3, variable=variable)
        assert len(made.rows(grid, PROCESS, **made.options)[-1].B) == terms


@pytest.mark.parametrize("name", [name for name, made in SOLVERS.items() if made.history == "data"])
def test_the_first_step_without_signal_is_finite(name):
    made = SOLVERS[name]
    grid = Flow().levels(np.linspace(1.0, 0.2, 6))
    assert grid[0].alpha == 0.0
    rows = compile_table(made, grid, Flow(), "flow").rows
    assert check_rows(rows, made.exact, made.history) <= 1e-12


@pytest.mark.parametrize("name", [name for name, made in SOLVERS.items() if made.history == "noise"])
def test_noise_histories_refuse_to_start_without_signal(name):
    with pytest.raises(ValueError, match="alpha"):
        compile_table(SOLVERS[name], Flow().levels(np.linspace(1.0, 0.2, 6)), Flow(), "flow")


@pytest.mark.parametrize("name, options", ONE_CALL + VARIANTS, ids=ids)
def test_rows_run_towards_noise_as_well(name, options):
    """Inversion: the mixture's data side goes to its noise side along the exact flow, at the order of the solver or better."""
    made, mixture = solver(name, **options), Mixture()
    if made.order == 0 or is_stochastic(made) or options.get("gamma") == 0.5:
        return
    errors = []
    for n in (40, 80):
        grid = lambda_levels(n)[::-1]
        rows = carry_mean(made.rows(grid, PROCESS, **made.options))
        x = execute(rows, made.history, mixture.denoise, mixture.quantile(grid[0], QUANTILES))
        errors.append(np.abs(x - mixture.quantile(grid[-1], QUANTILES)).max())
    # below 1e-4 the low-order start and the rest cancel in places, which bends slopes
    assert errors[1] < 1e-4 or (errors[1] < 0.16 and slopes(errors)[0] > min(made.order, 2) - 0.35)


def test_stochastic_rows_refuse_rising_noise():
    for name in ("sde-dpmpp-2m", "sa", "ddpm", "euler-a"):
        with pytest.raises(ValueError, match="more noise"):
            SOLVERS[name].rows(lambda_levels(6)[::-1], PROCESS, **SOLVERS[name].options)


@pytest.mark.parametrize("name", [name for name, _ in ONE_CALL if "s_noise" in SOLVERS[name].options])
@pytest.mark.parametrize("s_noise", [0.0, 1.003])
def test_noise_may_be_scaled_by_hand(name, s_noise):
    """Constant data still goes through exactly, and the noise is the default's times s_noise."""
    made, usual = solver(name, s_noise=s_noise), SOLVERS[name]
    rows = compile_table(made, lambda_levels(6), PROCESS).rows
    for row, other in zip(rows, usual.rows(lambda_levels(6), PROCESS, **usual.options), strict=True):
        assert sum(n.scale for n in row.noise) == pytest.approx(s_noise * sum(n.scale for n in other.noise), rel=1e-14)
        assert row.A == other.A and row.B == other.B


def test_names_with_an_order_and_errors():
    assert solver("unipc-3") == solver("unipc", order=3) and solver("unipc-3").order == 4
    assert solver("deis-2", variable="rho").options == {"order": 2, "variable": "rho", "lower_order_below": 0}
    assert solver("lms-4").order == 4 and solver("sa-3").options["order"] == 3
    assert solver("unipc", history="noise").history == "noise"
    assert solver("dpmpp-3m").order == 2 and solver("dpmpp-3m", third="exact").order == 3
    with pytest.raises(ValueError, match=r"did you mean 'dpmpp-2m'.*unipc"):
        solver("dpmp-2m")
    with pytest.raises(ValueError, match="drop order"):
        solver("unipc-3", order=2)
    with pytest.raises(ValueError, match="unknown option 'etta'; known are eta"):
        solver("ddim", etta=1.0)
    for name, options in (("unipc", {"solver_type": "bh3"}), ("deis", {"variable": "x"}), ("lms", {"order": 7})):
        with pytest.raises(ValueError, match="known are"):
            compile_table(solver(name, **options), lambda_levels(4), PROCESS)
