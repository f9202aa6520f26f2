"""Certificates: what a solver promises, measured here and now against closed forms or against diffusers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.ops.solver_step import COEF, solver_step
from fastdiff.process import Flow, Level, Process, VPLinear
from fastdiff.solvers import SOLVERS
from fastdiff.solvers.catalog import solver as find_solver
from fastdiff.solvers.exact import GaussianMixture, gaussian
from fastdiff.solvers.row import Solver
from fastdiff.solvers.table import SolverTable, check_rows, compile_table

_STEPS = 20  # of the errors that are printed
_SLACK = 0.35  # of a measured order below the claimed one
_ERROR = {0: 1.0, 1: 0.15, 2: 0.05, 3: 0.02, 4: 0.02}  # of the 20-step error on the normal distribution, by order
_C0, _C1 = COEF.index("C0"), COEF.index("C1")


@dataclass(frozen=True)
class Certificate:
    """What was measured for one solver. NaN where a quantity does not apply.

    against     "exact", or the diffusers class and config that it was compared with
    order       measured order of convergence; `claimed` is the solver's own
    error       of 20 steps on normal data: of the state (relative) for ODE solvers, of the variance for stochastic ones
    invariant   worst violation of the row invariants that the solver claims
    difference  largest relative difference to the diffusers scheduler over 20 steps, its formulas in float64
    stock_difference  the same to the scheduler as it is, in float32
    """

    solver: str
    against: str
    passed: bool
    message: str = ""
    order: float = np.nan
    claimed: int = 0
    error: float = np.nan
    invariant: float = np.nan
    difference: float = np.nan
    stock_difference: float = np.nan

    def __str__(self) -> str:
        numbers = {"order": f"{self.order:.2f} (claimed {self.claimed})", "error": f"{self.error:.1e}"}
        numbers |= {"invariant": f"{self.invariant:.0e}", "difference": f"{self.difference:.1e}"}
        numbers |= {"stock_difference": f"{self.stock_difference:.1e}"}
        shown = ", ".join(
            f"{name.replace('_', ' ')} {text}" for name, text in numbers.items() if not np.isnan(getattr(self, name))
        )
        return f"{'ok  ' if self.passed else 'FAIL'} {self.solver:14s} {self.against:7s} {shown}{self.message and ': '}{self.message}"


def verify(solvers: str | Sequence[str] = "all", against: str = "exact") -> list[Certificate]:
    """Measures solvers in float64, through the backend of ops.solver_step that serves this machine.

    solvers  "all" or names of SOLVERS
    against  "exact": order on a mixture of normals, error on a normal distribution, row invariants;
             "diffusers": the schedulers with the same settings, for the solvers that have one

    Raises ValueError for unknown names, RuntimeError where diffusers is asked for and missing.
    """
    if against not in ("exact", "diffusers"):
        raise ValueError(f"verify: unknown against={against!r}; known are exact, diffusers")
    found = list(SOLVERS.values()) if solvers == "all" else [find_solver(name) for name in solvers]
    if against == "exact":
        return [_certify(solver) for solver in found]
    from fastdiff.solvers.compat.verify import certify_parity

    return [record for solver in found for record in certify_parity(solver)]


def _certify(solver: Solver) -> Certificate:
    ready = _asymptotic(solver)
    measure = _variance_error if _is_stochastic(ready) else _flow_error
    table, _ = _table(ready, _STEPS)
    invariant = check_rows(table.rows, solver.exact, solver.history)
    error = measure(ready, _STEPS, gaussian())
    order = np.nan
    if solver.order > 0:
        data = gaussian() if measure is _variance_error else GaussianMixture()
        errors = [measure(ready, steps, data) for steps in (80, 160)]
        order = float(np.log2(errors[0] / errors[1]))
    failures = []
    if solver.order > 0 and not order >= solver.order - _SLACK:
        failures.append(f"converges with order {order:.2f}, not {solver.order}")
    if solver.order > 0 and not error <= _ERROR[min(solver.order, 4)]:
        failures.append(f"20 steps are off by {error:.1e} on a normal distribution")
    if not failures:
        return Certificate(solver.name, "exact", True, "", order, solver.order, error, invariant)
    message = "; ".join(failures) + "; its table or the step kernel is wrong"
    return Certificate(solver.name, "exact", False, message, order, solver.order, error, invariant)


def _asymptotic(solver: Solver) -> Solver:
    """The solver without what hides its order: low-order last steps, noise in an interval only, noise scaled by hand."""
    wanted = {"lower_order_final": False, "lower_order_below": 0, "interval": (-np.inf, np.inf), "s_noise": 1.0}
    if "s_churn" in solver.options:  # beyond about 100 steps EDM's churn no longer meets its cap; 10 never does
        wanted["s_churn"] = min(float(solver.options["s_churn"]), 10.0)
    return solver.with_options(**{name: value for name, value in wanted.items() if name in solver.options})


def _levels(solver: Solver, steps: int) -> tuple[list[Level], Process]:
    if solver.history == "flow":
        return Flow().levels(np.linspace(0.95, 0.05, steps + 1)), Flow()
    process = VPLinear()
    return process.levels(process.time_of_lam(np.linspace(-3.0, 3.0, steps + 1))), process


def _table(solver: Solver, steps: int) -> tuple[SolverTable, Process]:
    levels, process = _levels(solver, steps)
    return compile_table(solver, levels, process, "data"), process


def _is_stochastic(solver: Solver) -> bool:
    return any(row.noise for row in _table(solver, 8)[0].rows)


class _Kernel:
    """Runs a table row by row on one state, float64, without its noise."""

    def __init__(self, table: SolverTable, x: torch.Tensor):
        self.table, self.x = table, x[None].clone()
        coef = table.coef.copy()
        coef[:, [_C0, _C1]] = 0.0
        self.coef, self.meta = torch.from_numpy(coef), torch.from_numpy(table.meta)
        self.history = torch.zeros(table.slots, *self.x.shape, dtype=torch.float64)
        self.rows = torch.arange(len(table), dtype=torch.int32)[:, None].contiguous()
        self.tick, self.seed = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)

    def step(self, data: torch.Tensor) -> None:
        """Applies the next row to this data prediction."""
        none = self.x.new_empty(0, *self.x.shape)
        fixed = (None, None, self.coef, self.meta, self.rows, self.seed)
        solver_step(self.x, self.history, none, self.tick, [data[None]], *fixed)


def _flow_error(solver: Solver, steps: int, data: GaussianMixture) -> float:
    """Largest error of the final state against the closed-form flow, relative to the largest state.

    Methods with one call per step start from exact states, as many as their order: otherwise the low-order warm-up of
    every multistep method would hide its order.
    """
    table, _ = _table(solver, steps)
    first = table.rows[0].at
    points = torch.linspace(-1.8, 1.8, 13, dtype=torch.float64) * first.sigma
    exact = solver.order if len(table) == table.steps else 0
    kernel = _Kernel(table, points)
    for r, row in enumerate(table.rows):
        kernel.step(data.denoise(row.at, kernel.x[0]))
        if r < exact:
            kernel.x[0] = data.flow(first, row.to, points)
    want = data.flow(first, table.end, points)
    return float((kernel.x[0] - want).abs().max() / want.abs().max())


def _variance_error(solver: Solver, steps: int, data: GaussianMixture) -> float:
    """Error of the final variance on N(m, s^2), exact: the coefficients of 1, of x_T and of every noise are propagated."""
    table, _ = _table(solver, steps)
    m, s = data.means[0], data.deviations[0]
    variance = lambda level: level.alpha**2 * s**2 + level.sigma**2
    keys = sorted({(n.step, n.stream) for row in table.rows for n in row.noise})
    basis = torch.eye(2 + len(keys), dtype=torch.float64)
    first = table.rows[0].at
    kernel = _Kernel(table, first.alpha * m * basis[0] + variance(first) ** 0.5 * basis[1])
    for row in table.rows:
        gain = row.at.alpha * s**2 / variance(row.at)
        kernel.step(gain * kernel.x[0] + row.at.sigma**2 * m / variance(row.at) * basis[0])
        for term in row.noise:
            kernel.x[0] += term.scale * basis[2 + keys.index((term.step, term.stream))]
    return abs(float((kernel.x[0, 1:] ** 2).sum()) - variance(table.end))
