"""Plan: the tables of all rows of a batch, merged into what the step kernel and the loop read."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.guidance import CFG
from fastdiff.ops.solver_step import COEF
from fastdiff.process import Process, convert
from fastdiff.solvers import Solver, SolverTable, compile_table, solver
from fastdiff.solvers.spacing import levels

MAX_STEPS = 100_000  # rows are compiled one by one: more is a mistake, and would look like a hang
_B0, _A0, _D0 = COEF.index("b0"), COEF.index("a"), COEF.index("d")


@dataclass(frozen=True)
class RowSettings:
    """How one sample of the batch is made.

    solver    a key of SOLVERS, a Solver with options, or a compiled SolverTable (which fixes steps and spacing)
    compat    "diffusers" or "k-diffusion": a named solver takes the steps of that code; None for its own options
    steps     solver steps, >= 1
    guidance  a scale or a CFG
    spacing   a key of SPACINGS, {"name": key, **its options}, explicit times, or None for the solver's own
    final     "zero" or "t_min": where the last step ends; None for the solver's own
    clamp     bounds on the predicted data, or None
    """

    solver: str | Solver | SolverTable = "dpmpp-2m"
    steps: int = 20
    guidance: float | CFG = 1.0
    spacing: str | Mapping | tuple[float, ...] | None = None
    final: str | None = None
    clamp: tuple[float, float] | None = None
    compat: str | None = None

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, (int, np.integer)) or self.steps < 1:
            raise ValueError(f"steps: must be an integer >= 1, got {self.steps!r}")
        if self.steps > MAX_STEPS:
            raise ValueError(f"steps: at most {MAX_STEPS} steps, got {self.steps}")
        if not isinstance(self.solver, SolverTable):
            object.__setattr__(self, "solver", solver(self.solver, compat=self.compat))
        if not isinstance(self.guidance, (CFG, int, float)):
            raise TypeError(f"guidance: must be a number or a CFG, got {self.guidance!r}")
        if not isinstance(self.guidance, CFG):
            object.__setattr__(self, "guidance", CFG(float(self.guidance)))
        if self.clamp is not None and not _is_interval(self.clamp):
            raise ValueError(f"clamp: must be (low, high) with low < high, got {self.clamp!r}")

    def key(self) -> tuple:
        """Equal keys make equal tables."""
        made = self.solver
        if isinstance(made, Solver):
            made = (made.name, tuple(sorted((name, _stable(value)) for name, value in made.options.items())))
        spacing = _stable(self.spacing) if self.spacing is not None else None
        return made, self.steps, self.guidance, spacing, self.final, self.clamp

    def compile(self, process: Process, prediction: str | tuple[float, float, float]) -> SolverTable:
        """The table of this row."""
        if isinstance(self.solver, SolverTable):
            return self.solver
        if self.clamp is not None and self.solver.history != "data":
            raise ValueError(
                f"clamp: {self.solver.name} keeps {self.solver.history} predictions; clamping needs a data solver"
            )
        spacing, options = (self.solver.spacing if self.spacing is None else self.spacing), {}
        if isinstance(spacing, Mapping):
            options = dict(spacing)
            spacing = options.pop("name", self.solver.spacing)
        noise_levels = levels(process, self.steps, spacing, self.final or self.solver.final, **options)
        return compile_table(self.solver, noise_levels, process, prediction, self.clamp)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is known before sampling starts. T ticks (model calls in time), B samples, J branches.

    coef     [R, 21] float64, guidance weights folded into b0..b3
    edited   [R, 21] float64, the same rows for an h that is given as data instead of a raw output
    factor   [R] float64, the conversion factor that the guidance weights multiply
    meta     [R, 6] int32
    rows     [T, B] int32 table rows, -1 where a sample has finished
    time     [T, B] float64 model times (0 where finished)
    step     [T, B] int32 solver step of each call
    weights  [T, B, J] float64 branch weights (0: not evaluated)
    tables   the table of each sample
    slots    history slots
    """

    coef: np.ndarray
    edited: np.ndarray
    factor: np.ndarray
    meta: np.ndarray
    rows: np.ndarray
    time: np.ndarray
    step: np.ndarray
    weights: np.ndarray
    tables: tuple[SolverTable, ...]
    slots: int

    @property
    def batch(self) -> int:
        return self.rows.shape[1]

    @property
    def ticks(self) -> int:
        return self.rows.shape[0]

    @property
    def branches(self) -> int:
        return self.weights.shape[2]

    @property
    def calls(self) -> int:
        """Network evaluations over all samples and branches."""
        return int(np.count_nonzero(self.weights))

    def finished(self, tick: int) -> np.ndarray:
        """[B] bool: samples that have finished after a call."""
        return self.rows[tick + 1] < 0 if tick + 1 < self.ticks else np.ones(self.batch, dtype=bool)

    def digest(self) -> str:
        """Hash of everything that decides the result, given the network and the seeds."""
        sha = hashlib.sha256()
        for array in (self.coef, self.meta, self.rows, self.time, self.weights):
            sha.update(f"{array.shape}{array.dtype}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()[:16]


def make_plan(settings: Sequence[RowSettings], process: Process, prediction: str | tuple[float, float, float]) -> Plan:
    """Compiles and merges the tables of a batch; equal settings share one block of rows."""
    blocks: dict[tuple, tuple[int, SolverTable]] = {}
    branches = max((row.guidance.branches for row in settings), default=1)
    coef, edited, factor, meta, weights = [], [], [], [], []
    start = 0
    for key, row in {row.key(): row for row in settings}.items():
        table = row.compile(process, prediction)
        blocks[key] = start, table
        block_weights = _branch_weights(row.guidance, table, process, branches)
        coef.append(_fold(table, block_weights))
        edited.append(_edited(table))
        factor.append(table.coef[:, _B0])
        meta.append(table.meta)
        weights.append(block_weights)
        start += len(table)
    index = [blocks[row.key()] for row in settings]
    ticks = max((len(table) for _, table in index), default=0)
    rows = np.full((ticks, len(settings)), -1, dtype=np.int32)
    time, step = np.zeros(rows.shape), np.zeros(rows.shape, dtype=np.int32)
    for b, (first, table) in enumerate(index):
        n = len(table)
        rows[:n, b], time[:n, b], step[:n, b] = first + np.arange(n), table.time, table.step
    flat = np.concatenate(weights) if weights else np.zeros((0, branches))
    live = np.where((rows >= 0)[..., None], flat[rows], 0.0) if flat.size else np.zeros((*rows.shape, branches))
    empty = np.zeros((0, len(COEF)))
    return Plan(
        np.concatenate(coef) if coef else empty,
        np.concatenate(edited) if edited else empty,
        np.concatenate(factor) if factor else np.zeros(0),
        np.concatenate(meta) if meta else np.zeros((0, 6), dtype=np.int32),
        *(rows, time, step, live),
        tables=tuple(table for _, table in index),
        slots=max((table.slots for _, table in index), default=0),
    )


def _is_interval(clamp: object) -> bool:
    numbers = isinstance(clamp, tuple) and len(clamp) == 2 and all(isinstance(end, (int, float)) for end in clamp)
    return numbers and clamp[0] < clamp[1]


def _stable(value: object) -> object:
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value)


def _branch_weights(guidance: CFG, table: SolverTable, process: Process, branches: int) -> np.ndarray:
    weights = np.zeros((len(table), branches))
    for r, row in enumerate(table.rows):
        own = guidance.weights(row.step, row.at.t / process.t_max)
        weights[r, : len(own)] = own
    return weights


def _fold(table: SolverTable, weights: np.ndarray) -> np.ndarray:
    coef = table.coef.copy()
    coef[:, _B0 : _B0 + weights.shape[1]] = coef[:, _B0 : _B0 + 1] * weights
    return coef


def _edited(table: SolverTable) -> np.ndarray:
    """Rows that take the (edited) data prediction as their only output.

    A table compiled from a scheduler object does not know how its raw outputs relate to the data: NaN, which the guard finds.
    """
    coef = table.coef.copy()
    if table.solver.history == "raw":
        coef[:, [_A0, _B0, _D0]] = np.nan
        return coef
    for r, row in enumerate(table.rows):
        coef[r, [_A0, _B0, _D0]] = convert("data", table.solver.history, row.at)
    return coef
