"""Solvers as data: name -> Solver; `compile_table` makes the rows that the engine executes."""

from fastdiff.solvers import (
    ancestral,
    bdia,
    consistency,
    deis,
    exp_adams,
    first_order,
    heun,
    multistep,
    pndm,
    sa,
    singlestep,
    unipc,
)
from fastdiff.solvers.catalog import solver
from fastdiff.solvers.presets import PRESETS
from fastdiff.solvers.row import Noise, Row, Solver
from fastdiff.solvers.table import SolverTable, compile_table

SOLVERS: dict[str, Solver] = {
    entry.name: entry
    for entry in (
        *first_order.SOLVERS,
        *multistep.SOLVERS,
        exp_adams.EXP_ADAMS,
        unipc.UNIPC,
        sa.SA,
        *deis.SOLVERS,
        *pndm.SOLVERS,
        bdia.BDIA,
        *heun.SOLVERS,
        *singlestep.SOLVERS,
        *ancestral.SOLVERS,
        *consistency.SOLVERS,
    )
}

__all__ = ["PRESETS", "SOLVERS", "Noise", "Row", "Solver", "SolverTable", "compile_table", "solver"]
