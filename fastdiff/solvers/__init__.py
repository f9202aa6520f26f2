"""Solvers as data: name -> Solver; `compile_table` makes the rows that the engine executes."""

from fastdiff.solvers import first_order
from fastdiff.solvers.row import Noise, Row, Solver
from fastdiff.solvers.table import SolverTable, compile_table

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (first_order.DDIM,)}

__all__ = ["SOLVERS", "Noise", "Row", "Solver", "SolverTable", "compile_table"]
