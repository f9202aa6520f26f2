"""SA-Solver: stochastic Adams predictor-corrector with a noise level tau that depends on time (Xue et al. 2023)."""

from collections.abc import Callable, Mapping

from fastdiff.process import VE, Level, Process
from fastdiff.solvers.exponential import EXACT, Rule, exponential_grid, exponential_rows, fold_corrector
from fastdiff.solvers.row import Row, Solver, choose


def sa_rows(
    levels: list[Level],
    process: Process,
    *,
    order: int,
    corrector_order: int,
    tau: float | Callable[[Level], float],
    interval: tuple[float, float] | None,
    history: str,
    rescale: bool,
    lower_order_final: bool,
) -> list[Row]:
    """SA-Solver in PEC mode: one call per step, predictor and corrector share their noise.

    order            predictor terms, 1 to 4
    corrector_order  corrector terms, the new prediction included, 1 to 4; 0 is the predictor alone
    tau              noise level inside `interval`, or a function of the level; the last step is deterministic
    interval         times with noise; None is 0.2 to 0.8 of t_max, and sigma from 0.05 to 1 for VE
    rescale          leading-term second moment in two-term rules, meant for few steps
    lower_order_final  let the orders fall to 1 (predictor) and 2 (corrector) at the end
    """
    choose("order", order, range(1, 5)), choose("corrector_order", corrector_order, range(0, 5))
    choose("history", history, ("data", "noise"))
    steps, rule = len(levels) - 1, Rule(history, "bh1" if rescale else "heun")
    left = [steps - r if lower_order_final else steps for r in range(steps)]
    orders = [min(order, r + 1, left[r]) for r in range(steps)]
    taus = [_tau(tau, interval, process, level) for level in levels[: steps - 1]] + [0.0]
    rows = exponential_rows(levels, orders, rule, taus)
    if corrector_order == 0:
        return rows
    grid, correctors = exponential_grid(levels), {}
    for r in range(steps - 1):
        terms = min(corrector_order, r + 2, left[r] + 1)
        correctors[r] = grid.weights(r, terms, rule, taus[r], first=r + 1)
    return fold_corrector(rows, correctors)


def _tau(tau, interval: tuple[float, float] | None, process: Process, level: Level) -> float:
    if callable(tau):
        return float(tau(level))
    if interval is None:
        interval = (0.05, 1.0) if isinstance(process, VE) else (0.2 * process.t_max, 0.8 * process.t_max)
    return float(tau) if interval[0] <= level.t <= interval[1] else 0.0


def _refine(options: Mapping) -> dict:
    corrector, predictor = options["corrector_order"], options["order"]
    order = min(corrector, predictor + 1) if corrector else predictor
    return {"order": order if options["tau"] == 0.0 else min(order, 2), "history": options["history"]}


SA = Solver(
    "sa",
    sa_rows,
    order=2,
    exact=EXACT,
    options={
        "order": 3,
        "corrector_order": 4,
        "tau": 1.0,
        "interval": None,
        "history": "data",
        "rescale": False,
        "lower_order_final": True,
    },
    refine=_refine,
)
