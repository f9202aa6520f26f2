"""Adams-Bashforth on x / alpha in kappa = sigma / alpha: DEIS in t, kappa or log kappa (Zhang and Chen 2023), and LMS.

The noise prediction is interpolated by a polynomial, and x'/alpha' = x/alpha + int_kappa^kappa' noise dkappa.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fastdiff.process import Level, Process
from fastdiff.solvers.exponential import Rule, exponential_rows, falling_orders, solve_moments
from fastdiff.solvers.row import Row, Solver, choose

_EXACT = frozenset({"data", "noise", "mean"})
_ROOT, _WEIGHT = np.polynomial.legendre.leggauss(20)
_ROOT, _WEIGHT = 0.5 * (_ROOT + 1.0), 0.5 * _WEIGHT  # on [0, 1]


def deis_rows(
    levels: list[Level], process: Process, *, order: int, variable: str, lower_order_below: int
) -> list[Row]:
    """DEIS with `order` predictions, interpolated in `variable`: "t", "rho" (kappa) or "logrho".

    Order p is called tAB(p - 1), rhoAB(p - 1) in the paper. In "t" and "logrho" the step to zero noise has order 1.
    """
    choose("order", order, range(1, 5)), choose("variable", variable, ("t", "rho", "logrho"))
    orders = falling_orders(len(levels) - 1, order, lower_order_below, False)
    if variable == "rho":
        return kappa_rows(levels, orders)
    if variable == "logrho":
        return exponential_rows(levels, orders, Rule("noise"))
    return _time_rows(levels, orders, process)


def lms_rows(levels: list[Level], process: Process, *, order: int) -> list[Row]:
    """Linear multistep in kappa, as k-diffusion's LMS but with exact integrals of the polynomials."""
    choose("order", order, range(1, 5))
    return kappa_rows(levels, [min(order, r + 1) for r in range(len(levels) - 1)])


def kappa_rows(levels: list[Level], orders: list[int]) -> list[Row]:
    """Rows whose polynomial is in kappa, with exact integrals."""
    kappa = [level.kappa for level in levels]
    return _rows(levels, orders, kappa, lambda r, count: [(kappa[r + 1] - kappa[r]) / (j + 1) for j in range(count)])


def _time_rows(levels: list[Level], orders: list[int], process: Process) -> list[Row]:
    """Rows whose polynomial is in t: moments int v^j dkappa, v = (t - t_s) / (t' - t_s), by parts and Gauss-Legendre."""
    if levels[-1].sigma == 0.0:
        orders = [*orders[:-1], 1]
    t = np.array([level.t for level in levels])
    v = 1.0 - _ROOT**2  # kappa behaves like a square root at t = 0; in the root of 1 - v it is smooth
    alpha, sigma = process.schedule(t[:-1, None] + np.diff(t)[:, None] * v)
    kappa = np.array([level.kappa for level in levels])
    rise = (sigma / alpha - kappa[:-1, None]) * (2.0 * _ROOT * _WEIGHT)
    moments = np.diff(kappa)[:, None] - np.arange(1, 4) * (rise @ np.stack([v**0, v, v**2], axis=1))
    table = np.concatenate([np.diff(kappa)[:, None], moments], axis=1).tolist()
    return _rows(levels, orders, t.tolist(), lambda r, count: table[r][:count])


def _rows(
    levels: list[Level], orders: list[int], place: list[float], moments: Callable[[int, int], list[float]]
) -> list[Row]:
    """Rows with weights sum_k w_k v_k^j = moments_j, where v are the places of the history relative to the step."""
    rows = []
    for r, order in enumerate(orders):
        at, to, length = levels[r], levels[r + 1], place[r + 1] - place[r]
        # a discrete schedule ends at t = 0 twice, with its least noise and with none: that step has no length, but order 1
        nodes = [0.0, *((place[r - k] - place[r]) / length for k in range(1, order))]
        w = solve_moments(nodes, moments(r, order))
        B = {r - k: to.alpha * value for k, value in enumerate(w)}
        rows.append(Row(at, to, to.alpha / at.alpha, B, step=r))
    return rows


def _order(options: Mapping) -> dict:
    return {"order": options["order"]}


DEIS = Solver(
    "deis",
    deis_rows,
    order=3,
    history="noise",
    exact=_EXACT,
    options={"order": 3, "variable": "t", "lower_order_below": 0},
    spacing="quadratic",
    refine=_order,
)
LMS = Solver(
    "lms", lms_rows, order=4, history="noise", exact=_EXACT, options={"order": 4}, spacing="karras", refine=_order
)
SOLVERS = (DEIS, LMS)
