"""What noise levels and rows must satisfy before a table is made of them."""

import math
from collections.abc import Sequence

import numpy as np

from fastdiff.process import PREDICTIONS, Level
from fastdiff.solvers.row import Row

_INVARIANT_TOLERANCE = 1e-9  # of the largest term; far below any table error that matters, far above rounding
_NO_SIGNAL = 1e-8  # of sigma: an alpha that rounding left over where it should be 0, as cos(pi / 2)


def check_levels(levels: Sequence[Level]) -> None:
    """Raises ValueError unless the noise falls (or, for inversion, rises) strictly."""
    if len(levels) < 2:
        raise ValueError(f"noise levels: at least 2 are needed (1 step), got {len(levels)}")
    kappa = np.array([level.kappa for level in levels])
    if np.isnan(kappa).any():
        raise ValueError("noise levels: NaN found; give finite, non-negative noise levels")
    with np.errstate(invalid="ignore"):
        change = np.diff(kappa)
    change[np.isinf(kappa[:-1]) & np.isfinite(kappa[1:])] = -1.0
    if not (np.all(change < 0) or np.all(change > 0)):
        at = int(np.argmax(change >= 0)) if change[0] < 0 else int(np.argmax(change <= 0))
        raise ValueError(
            f"noise levels: must be strictly monotonic, got {kappa[at]:g} then {kappa[at + 1]:g} at step {at}"
        )


def check_history(levels: Sequence[Level], history: str, exact: frozenset[str]) -> None:
    """Raises ValueError where a step starts at a level that this type of prediction cannot leave and still be `exact`."""
    if history == "data" and any(level.sigma == 0.0 for level in levels[:-1]):
        raise ValueError(
            "noise levels: a step of a solver with a data history cannot start at zero noise; begin slightly above"
        )
    if history == "noise" and "data" in exact and any(level.alpha <= _NO_SIGNAL * level.sigma for level in levels):
        raise ValueError(
            "noise levels: a solver with a noise history cannot start at alpha = 0; use one with a data history "
            "(ddim, dpmpp-2m, unipc) or start below the terminal noise level"
        )


def check_rows(
    rows: Sequence[Row], exact: frozenset[str], history: str, tolerance: float = _INVARIANT_TOLERANCE
) -> float:
    """Checks the invariants that a solver claims (solver exact on constant data, on constant noise, in variance).

    Returns the largest violation relative to the largest term; raises ValueError above the tolerance.
    """
    worst = 0.0
    for r, row in enumerate(rows if exact else ()):
        for name, terms, want in _invariants(r, row, rows, history):
            if name in exact:
                error = abs(math.fsum(terms) - want) / max(*map(abs, terms), abs(want), 1e-30)
                worst = max(worst, error)
                if not error <= tolerance:
                    raise ValueError(f"SolverTable: row {r} is not exact for constant {name} (off by {error:.1e})")
    return worst


def _invariants(r: int, row: Row, rows: Sequence[Row], history: str):
    """(name, terms, wanted sum): what constant data, constant noise and the marginal variance demand of a row."""
    own = {**row.B, r: row.B.get(r, 0.0) + row.R}
    values = {k: _history_value(rows[k].at, history) for k in own}
    level = [(row.A, row.at), *((v, rows[k].at) for k, v in row.X.items())]
    data = [v * at.alpha for v, at in level] + [own[k] * values[k][0] for k in own]
    noise = [v * at.sigma for v, at in level] + [own[k] * values[k][1] for k in own]
    yield "data", data, row.to.alpha
    if not row.noise:
        yield "noise", noise, row.to.sigma
    if history == "data":
        yield "variance", [math.fsum(noise) ** 2, *(n.scale**2 for n in row.noise)], row.to.sigma**2
    yield "mean", [v * at.mean for v, at in level] + [row.D or 0.0], row.to.mean


def _history_value(level: Level, history: str) -> tuple[float, float]:
    """(coefficient of x0, of noise) in a prediction of type `history` at a level."""
    p, q, r = PREDICTIONS[history](level)
    return p + r * level.alpha, q + r * level.sigma
