"""SolverTable: a solver compiled for one process and one list of noise levels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastdiff.ops.solver_step import COEF, MAX_SLOTS, META
from fastdiff.process import Level, Process, convert
from fastdiff.solvers.invariants import check_history, check_levels, check_rows
from fastdiff.solvers.row import Row, Solver

_COLUMN = {name: index for index, name in enumerate(COEF)}


@dataclass(frozen=True, eq=False)
class SolverTable:
    """Rows for `ops.solver_step`, in float64. Checks itself on construction.

    coef      [R, 21] columns `ops.solver_step.COEF`; b0 is the conversion factor of the guided prediction
    meta      [R, 6] int32, columns META
    time      [R] the model's time input of each call
    step      [R] the solver step that each call belongs to
    rows      the rows that it was made of
    slots     history slots needed
    c_in      [R] factor on the state before each call
    """

    solver: Solver
    prediction: str | tuple[float, float, float]
    rows: tuple[Row, ...]
    coef: np.ndarray
    meta: np.ndarray
    time: np.ndarray
    step: np.ndarray
    c_in: np.ndarray
    slots: int

    def __post_init__(self):
        if not np.all(np.isfinite(self.coef[:, [i for n, i in _COLUMN.items() if n not in ("lo", "hi")]])):
            raise ValueError(
                f"SolverTable: {self.solver.name} has coefficients that are not finite on these noise levels"
            )
        check_rows(self.rows, self.solver.exact, self.solver.history)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def start(self) -> Level:
        """The level of the initial state: sigma times noise (+ mean u)."""
        return self.rows[0].at

    @property
    def end(self) -> Level:
        """The level at which the trajectory ends."""
        return self.rows[-1].to

    @property
    def steps(self) -> int:
        """Number of solver steps."""
        return int(self.step[-1]) + 1


def compile_table(
    solver: Solver,
    levels: Sequence[Level],
    process: Process,
    prediction: str | tuple[float, float, float] = "noise",
    clamp: tuple[float, float] | None = None,
) -> SolverTable:
    """Compiles a solver for one list of noise levels.

    levels      n + 1 levels, noise falling; the last is where the trajectory ends
    prediction  what the network returns: a key of PREDICTIONS or a linear mix (p, q, r)
    clamp       bounds on the prediction h (of the data), or None

    Raises ValueError when the levels are fewer than two or not monotonic.
    """
    check_levels(levels)
    check_history(levels, solver.history, solver.exact)
    rows = solver.rows(list(levels), process, **solver.options)
    conversions = [convert(prediction, solver.history, row.at) for row in rows]
    c_in = np.array([process.input_scale(row.at) for row in rows])
    return assemble(solver, rows, prediction, conversions, c_in, clamp)


def assemble(
    solver: Solver,
    rows: Sequence[Row],
    prediction: str | tuple[float, float, float],
    conversions: Sequence[tuple[float, float, float]],
    c_in: np.ndarray,
    clamp: tuple[float, float] | None = None,
) -> SolverTable:
    """The table of these rows; conversions[r] = (a, b, d) makes the remembered prediction a x + b m + d u of row r."""
    rows = carry_mean(rows)
    meta, slot_of = _assign_slots(rows)
    coef = np.zeros((len(rows), len(COEF)))
    lo, hi = clamp if clamp is not None else (-np.inf, np.inf)
    for r, row in enumerate(rows):
        a, b, d = conversions[r]
        put = {"a": a, "b0": b, "d": d, "lo": lo, "hi": hi, "A": row.A, "B": row.B.get(r, 0.0), "R": row.R}
        put["D"] = row.D or 0.0
        for key, value in _slot_terms(r, row, slot_of).items():
            put[f"S{key}"] = value
        for name, noise in zip(("C0", "C1"), row.noise, strict=False):
            put[name] = noise.scale
        put["c_in"] = c_in[r + 1] if r + 1 < len(rows) else 0.0
        for name, value in put.items():
            coef[r, _COLUMN[name]] = value
    time = np.array([row.at.time for row in rows])
    step = np.array([row.step for row in rows])
    slots = 1 + max((int(meta[:, :2].max()), -1)) if len(rows) else 0
    return SolverTable(solver, prediction, rows, coef, meta, time, step, c_in, slots)


def carry_mean(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Fills in D where a row leaves it open: the weight of the known endpoint u moves from mean(at) to mean(to)."""
    return tuple(replace(row, D=_mean_left(row, rows)) if row.D is None and _has_mean(row) else row for row in rows)


def _has_mean(row: Row) -> bool:
    return row.to.mean != 0.0 or row.at.mean != 0.0


def _mean_left(row: Row, rows: Sequence[Row]) -> float:
    return row.to.mean - row.A * row.at.mean - sum(v * rows[k].at.mean for k, v in row.X.items())


def _assign_slots(rows: Sequence[Row]) -> tuple[np.ndarray, dict[tuple[str, int], int]]:
    """Gives every prediction and state that a later row reads a history slot, and reuses slots that are free."""
    last_use: dict[tuple[str, int], int] = {}
    for r, row in enumerate(rows):
        for kind, reads in (("h", row.B), ("x", row.X)):
            last_use.update({(kind, k): r for k in reads if k < r})
    meta = np.zeros((len(rows), len(META)), dtype=np.int32)
    slot_of: dict[tuple[str, int], int] = {}
    busy: dict[int, tuple[str, int]] = {}
    for r, row in enumerate(rows):
        # a slot whose last reader is this row may be overwritten by it: elements are read before they are written
        busy = {slot: key for slot, key in busy.items() if last_use[key] > r}
        for column, kind in enumerate("hx"):
            meta[r, column] = -1
            if last_use.get((kind, r), -1) > r:
                slot = next(s for s in range(len(rows) + 2) if s not in busy)
                busy[slot], slot_of[kind, r], meta[r, column] = (kind, r), slot, slot
        if busy and max(busy) >= MAX_SLOTS:
            raise ValueError(f"SolverTable: row {r} needs {max(busy) + 1} history slots, there are {MAX_SLOTS}")
        for place, noise in enumerate(row.noise):
            meta[r, 2 + 2 * place : 4 + 2 * place] = noise.step, noise.stream
    return meta, slot_of


def _slot_terms(r: int, row: Row, slot_of: dict) -> dict[int, float]:
    reads = {("h", k): v for k, v in row.B.items() if k < r} | {("x", k): v for k, v in row.X.items() if k < r}
    return {slot_of[key]: value for key, value in reads.items() if value != 0.0}
