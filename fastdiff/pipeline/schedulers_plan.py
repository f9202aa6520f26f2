"""A step of a scheduler as rows of the step kernel, and where a run stands before and after it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fastdiff.pipeline.schedulers_probe import DEAD, SLOT, Ref

_EXACT = 1e-9


class LostError(RuntimeError):
    """A hidden result is needed that cannot be had any more."""


@dataclass(frozen=True, eq=False)
class Relation:
    """What is known of results d that were not written: history[kept] = weights . d + sum of rest[s] history[s]."""

    kept: int
    weights: np.ndarray
    rest: Mapping[int, float]


@dataclass(eq=False)
class Node:
    """Where a run stands.

    state  the scheduler's attributes, with a `Ref` for every tensor like the sample
    depth  steps since the timesteps were set
    next   what was asked -> its Plan, or the reason why that step is left to the scheduler
    """

    state: dict[str, object]
    depth: int = 0
    relation: Relation | None = None
    next: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Plan:
    """One step as kernel rows. Operands: x is the noise, aux the sample, outputs the model's output and some slots.

    coef       [21] the row of the next state; further [21] rows of other results, each a pass of its own
    places     slots that receive the last of these
    slot_h     slot that receives the prediction, or -1; own_h: it goes to fresh memory instead
    keep       slot that receives a copy of the next state, or -1
    inputs     slots that are read as model outputs
    names      of the results in `kind`, the class in which the scheduler returns them; their places where it is None, a tuple
    results    for each of `names`: "next", "h", the number of a further row, or None
    noise      "drawn", "given" (as an argument), "kernel" (made inside), "none", or "output": x is the model's output instead
    plain      attributes to set; tensors: the same as references; hidden: those that are not in memory
    slots      history slots needed
    node       where the run stands after the step
    """

    coef: np.ndarray
    further: tuple[np.ndarray, ...]
    places: tuple[int, ...]
    slot_h: int
    own_h: bool
    keep: int
    inputs: tuple[int, ...]
    names: tuple[object, ...]
    results: tuple[object, ...]
    kind: type | None
    noise: str
    plain: dict[str, object]
    tensors: dict[str, object]
    hidden: tuple[str, ...]
    slots: int
    node: Node


def references(value: object) -> Iterator[Ref]:
    """Every reference in an attribute's value."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from references(entry)


def slot_of(v: np.ndarray) -> int | None:
    """The slot that v is a multiple of, if any."""
    (places,) = np.nonzero(v)
    return int(places[0]) - SLOT if len(places) == 1 and SLOT <= places[0] < DEAD else None


def ratio(v: np.ndarray, h: np.ndarray) -> float | None:
    """r with v = r h, if any; exactly 1 where that is only a rounding away."""
    r = float(v @ h / (h @ h)) if h.any() else 0.0
    if np.abs(v - r * h).max() > _EXACT * np.abs(v).max():
        return None
    return 1.0 if abs(r - 1.0) < _EXACT else r


def arrays(value: object) -> Iterator[np.ndarray]:
    """Every vector in attributes' values."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from arrays(entry)


def mapped(value: object, make: Callable[[np.ndarray], Ref]) -> object:
    """`value` with references in the places of vectors."""
    if isinstance(value, np.ndarray):
        return make(value)
    if isinstance(value, dict):
        return {name: mapped(entry, make) for name, entry in value.items()}
    return [mapped(entry, make) for entry in value] if isinstance(value, list) else value
