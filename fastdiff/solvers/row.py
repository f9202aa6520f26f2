"""What a solver writes down: one row per model call, in terms of earlier predictions and states."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastdiff.process import Level

INITIAL_STREAM, STEP_STREAM, SECOND_STREAM = 0, 1, 2  # independent noise of one (seed, step)

RISING = "solver: fresh noise cannot be added on the way to more noise; set eta or tau to 0"


@dataclass(frozen=True)
class Noise:
    """`scale` times fresh standard normal noise; equal (step, stream) mean equal noise."""

    scale: float
    step: int
    stream: int = STEP_STREAM


@dataclass(frozen=True)
class Row:
    """One model call and the update after it: x' = A x + sum_k B[k] h_k + sum_k X[k] x_k + noise + D u.

    at    level of the model call; the state x stands there when the row begins
    to    level of x'
    A     on the current state
    B     on predictions h_k, by the index k of the row that made them (this row's own included)
    X     on earlier states x_k, by the index k of the row at whose start they stood
    R     on this row's prediction before clamping (the reference DDIM mixes both)
    D     on the known endpoint u; None means whatever carries its weight from level to level
    step  which solver step the row belongs to (a step may take several calls)
    """

    at: Level
    to: Level
    A: float
    B: Mapping[int, float]
    X: Mapping[int, float] = field(default_factory=dict)
    noise: tuple[Noise, ...] = ()
    R: float = 0.0
    D: float | None = None
    step: int = 0


@dataclass(frozen=True)
class Solver:
    """A solver: a function from noise levels to rows, and what it promises.

    rows        (levels, process, **options) -> list[Row]; levels has n + 1 entries, the last one is where it ends
    order       global order of convergence that tests measure (the weak order where it is stochastic)
    history     which quantity h is: a key of `process.PREDICTIONS`
    calls       model calls per step, for the number of steps that a budget of calls allows
    exact       row invariants that hold: "data" (constant x0), "noise" (constant noise), "variance" (marginal variance)
    spacing     the default entry of SPACINGS
    final       where the last step ends: "zero" noise or the process's "t_min"
    refine      fields that follow from the options (say, the order), as a function of all options
    """

    name: str
    rows: Callable[..., list[Row]]
    order: int
    history: str = "data"
    calls: int = 1
    exact: frozenset[str] = frozenset({"data", "noise"})
    options: Mapping[str, object] = field(default_factory=dict)
    spacing: str = "uniform-lambda"
    final: str = "zero"
    refine: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None

    def with_options(self, **options) -> "Solver":
        """This solver with some of its options changed. Raises ValueError for an unknown option, listing the known ones."""
        unknown = set(options) - set(self.options)
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"solver {self.name}: unknown option {sorted(unknown)[0]!r}; known are {known}")
        merged = {**self.options, **options}
        return replace(self, options=merged, **(self.refine(merged) if self.refine else {}))


def choose(option: str, value: object, table: Mapping | Sequence):
    """`table[value]` (or `value` itself where `table` is a sequence). Raises ValueError that lists what is known."""
    if value not in table:
        raise ValueError(f"solver option {option}={value!r} is unknown; known are {', '.join(map(str, table))}")
    return table[value] if isinstance(table, Mapping) else value
