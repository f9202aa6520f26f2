"""Exponential Adams-Bashforth with all moments exact, and a start that keeps its order."""

from collections.abc import Mapping

from fastdiff.process import Level, Process
from fastdiff.solvers.exponential import EXACT, Rule, exponential_grid, exponential_rows, falling_orders
from fastdiff.solvers.row import Row, Solver, choose
from fastdiff.solvers.singlestep import single_rows


def exp_adams_rows(levels: list[Level], process: Process, *, order: int, history: str, start: str) -> list[Row]:
    """Exponential Adams-Bashforth in lambda (Hochbruck and Ostermann 2010, eq. 4.6), orders 1 to 5.

    start  "rising": orders 1, 2, ... in the first steps, whose error of second order stays; "single": three calls in each of
           the first order - 1 steps, whose error is of fourth order
    """
    choose("order", order, range(1, 6)), choose("history", history, ("data", "noise"))
    choose("start", start, ("rising", "single"))
    steps = len(levels) - 1
    if start == "rising":
        return exponential_rows(levels, falling_orders(steps, order, 0, False), Rule(history))
    rows = single_rows(levels[:order], process, order=3, history=history, solver_type="heun") if order > 1 else []
    call_of: dict[int, int] = {}
    for r, row in enumerate(rows):
        call_of.setdefault(row.step, r)
    grid = exponential_grid(levels)
    for i in range(len(call_of), steps):
        call_of[i] = len(rows)
        B = {call_of[k]: value for k, value in grid.weights(i, order, Rule(history)).items()}
        rows.append(grid.row(i, B, history))
    return rows


def _refine(options: Mapping) -> dict:
    order = options["order"] if options["start"] == "rising" else min(options["order"], 4)
    return {"order": order, "history": options["history"]}


EXP_ADAMS = Solver(
    "exp-adams",
    exp_adams_rows,
    order=3,
    exact=EXACT,
    options={"order": 3, "history": "data", "start": "rising"},
    refine=_refine,
)
