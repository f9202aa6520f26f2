"""Solvers as data: name -> Solver; `compile_table` makes the rows that the engine executes."""

from fastdiff.solvers import ancestral, consistency, first_order, heun, singlestep
from fastdiff.solvers.row import Noise, Row, Solver
from fastdiff.solvers.table import SolverTable, compile_table

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        first_order.DDIM,
        *heun.SOLVERS,
        *singlestep.SOLVERS,
        *ancestral.SOLVERS,
        *consistency.SOLVERS,
    )
}

__all__ = ["SOLVERS", "Noise", "Row", "Solver", "SolverTable", "compile_table"]
