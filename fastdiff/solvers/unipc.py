"""UniPC: a unified predictor-corrector whose corrector costs no extra model call (Zhao et al. 2023)."""

from fastdiff.process import Level, Process
from fastdiff.solvers.exponential import EXACT, Rule, exponential_grid, exponential_rows, fold_corrector
from fastdiff.solvers.row import Row, Solver, choose


def unipc_rows(
    levels: list[Level],
    process: Process,
    *,
    order: int,
    solver_type: str,
    history: str,
    lower_order_final: bool,
    disable_corrector: tuple[int, ...] | str,
) -> list[Row]:
    """UniPC of order 1 to 4, as rows on the predicted state.

    solver_type        "bh1" or "bh2": the weight where a single difference is used
    disable_corrector  steps after which the state is not corrected, or "all" (the predictor alone)
    """
    choose("order", order, range(1, 5)), choose("solver_type", solver_type, ("bh1", "bh2"))
    choose("history", history, ("data", "noise"))
    steps, rule = len(levels) - 1, Rule(history, solver_type)
    orders = [min(order, r + 1, steps - r if lower_order_final else order) for r in range(steps)]
    rows = exponential_rows(levels, orders, rule)
    if disable_corrector == "all":
        return rows
    grid = exponential_grid(levels)
    corrected = (r for r in range(steps - 1) if r not in disable_corrector)
    return fold_corrector(rows, {r: grid.weights(r, orders[r] + 1, rule, first=r + 1) for r in corrected})


def _refine(options) -> dict:
    corrected = options["disable_corrector"] != "all"
    return {"order": options["order"] + corrected, "history": options["history"]}


UNIPC = Solver(
    "unipc",
    unipc_rows,
    order=3,
    exact=EXACT,
    options={
        "order": 2,
        "solver_type": "bh2",
        "history": "data",
        "lower_order_final": True,
        "disable_corrector": (),
    },
    refine=_refine,
)
