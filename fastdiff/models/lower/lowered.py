"""What a lowered model is to those who run it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fastdiff.models.lower.record import Record, UnsupportedError
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor


@dataclass(frozen=True)
class Call:
    """One forward call, taken apart.

    sample    what changes from call to call, `[B, ...]`
    temporal  the arguments of the temporal table, each with B rows
    context   conditioning that stays the same over many calls, each with B rows
    wrap      makes the module's return value of the result
    """

    sample: Tensor
    temporal: tuple[Tensor, ...]
    context: tuple[Tensor, ...]
    wrap: Callable[[Tensor], object]


class Lowered(Protocol):
    """A model with packed weights. `body` and `encode` compute through fastdiff.ops only, so that they can be recorded.

    encode  from the context to what depends on nothing else (keys and values of cross-attention)
    body    from the sample, the temporal rows `[B, width]` and the encoded context to the prediction, in float32 or the
            sample's dtype
    """

    record: Record
    temporal: TemporalTable

    def read(self, *args, **kwargs) -> Call:
        """Takes the module's own arguments apart; raises UnsupportedError for those that it does not know."""

    def prepare(self, call: Call) -> None:
        """Makes constants that depend on the shapes of the call, before `body` is recorded for them."""

    def encode(self, *context: Tensor) -> tuple[Tensor, ...]: ...

    def body(self, sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor: ...


class Staged(Lowered, Protocol):
    """A lowered model whose body is `tail(middle(head))`, so that the features of the middle can be used again.

    adds  the middle adds to the features `[B, ...]` that come first in the head, else it makes features of its own
    """

    adds: bool

    def head(self, sample: Tensor, rows: Tensor, *encoded: Tensor) -> tuple[Tensor, ...]: ...

    def middle(self, head: tuple[Tensor, ...], rows: Tensor, *encoded: Tensor) -> Tensor: ...

    def tail(self, x: Tensor, head: tuple[Tensor, ...], sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor: ...


def output_class(module: nn.Module, name: str) -> type:
    """The class of the module's results, found beside the module's own class."""
    return inspect.unwrap(type(module).forward).__globals__[name]


def rows_of_time(t: Tensor | float | int, rows: int) -> Tensor:
    """Timesteps as `[rows]`, in the dtype that the caller chose."""
    t = t if isinstance(t, Tensor) else torch.tensor([t])
    t = t.reshape(-1)
    if t.numel() not in (1, rows):
        raise UnsupportedError(f"timestep: 1 or {rows} values expected, got {t.numel()}")
    return t.expand(rows)


def require(condition: bool, reason: str) -> None:
    """Raises UnsupportedError with the reason unless the condition holds."""
    if not condition:
        raise UnsupportedError(reason)


def only_defaults(**arguments: object) -> None:
    """Raises UnsupportedError for an argument that is neither None nor empty."""
    for name, value in arguments.items():
        require(value is None or value == {}, f"argument {name} is not lowered")
