"""BDIA-DDIM: a step that can be undone exactly, from the two newest states (Zhang et al. 2024)."""

from fastdiff.process import Level, Process
from fastdiff.solvers.first_order import affine_row
from fastdiff.solvers.row import Row, Solver


def bdia_rows(levels: list[Level], process: Process, *, gamma: float) -> list[Row]:
    """x' = gamma (x_old - DDIM(x -> old level)) + DDIM(x -> new level); the first step is DDIM.

    On rising noise the rows invert those of the same levels in falling order: gamma becomes 1 / gamma. An inversion that is
    to be exact takes its first two states from the forward run. The state must be float64 when gamma is far from 1: every
    inverted step divides rounding errors by gamma.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"solver bdia: gamma must be in [0, 1], got {gamma:g}")
    if levels[1].kappa > levels[0].kappa:
        if gamma == 0.0:
            raise ValueError("solver bdia: gamma = 0 forgets the older state and cannot be inverted; use gamma near 1")
        gamma = 1.0 / gamma
    rows = [affine_row(0, levels[0], levels[1])]
    for r in range(1, len(levels) - 1):
        old, at, to = levels[r - 1], levels[r], levels[r + 1]
        A = (to.sigma - gamma * old.sigma) / at.sigma
        B = to.alpha - gamma * old.alpha - A * at.alpha
        rows.append(Row(at, to, A, {r: B}, {r - 1: gamma} if gamma else {}, step=r))
    return rows


BDIA = Solver(
    "bdia",
    bdia_rows,
    order=2,
    exact=frozenset({"data", "noise", "mean"}),
    options={"gamma": 1.0},
    spacing="uniform",
    refine=lambda options: {"order": 2 if options["gamma"] == 1.0 else 1},
)
