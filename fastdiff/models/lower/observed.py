"""Static ranges of int8 convolutions at each step: what a trajectory of the module itself showed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
_LEAST = 1e-10  # of an input that is zero throughout, any range serves


@dataclass(frozen=True)
class Observed:
    """What entered convolutions.

    times   [S] float32, the times that the module was called with
    scales  from the name of a segment of an input to [S] float32: what a code of 1 means at each time
    """

    times: Tensor
    scales: dict[str, Tensor]


def segment_names(name: str, count: int) -> tuple[str, ...]:
    """Names of the segments of a convolution's input."""
    return (name, f"{name} (second segment)")[:count]


class Observer:
    """Keeps the largest magnitudes, by segment and time, that enter convolutions while a module is called."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._largest: dict[str, dict[float, float]] = {}

    def follow(self, times: Tensor) -> None:
        """Takes the times `[B]` of the call that begins."""
        self._times = times.float().tolist()

    def note(self, name: str, x: Tensor) -> None:
        """Takes a segment `[B, H, W, C]` of the call in progress. Raises ValueError where it is not finite."""
        seen = self._largest.setdefault(name, {})
        for time, largest in zip(self._times, x.abs().flatten(1).amax(1).tolist(), strict=True):
            if not math.isfinite(largest):
                raise ValueError(f"accelerate: during calibration NaN or infinity entered {name}")
            seen[time] = max(seen.get(time, _LEAST), largest)

    def ranges(self) -> Observed:
        """The ranges so far. Raises ValueError where no convolution was called."""
        if not self._largest:
            raise ValueError("accelerate: calibration ran, but no int8 convolution of the module was called")
        times = list(next(iter(self._largest.values())))
        table = lambda seen: torch.tensor([seen[time] for time in times]) / 127
        return Observed(torch.tensor(times), {name: table(seen) for name, seen in self._largest.items()})


@dataclass(frozen=True)
class WatchedConv:
    """A PackedConv whose inputs are observed."""

    conv: Callable
    names: tuple[str, ...]
    observer: Observer

    @property
    def padding(self) -> list[int]:
        return self.conv.padding

    def __call__(self, x: Tensor, second: Tensor | None = None, *args, **kwargs) -> Tensor:
        """As the PackedConv does."""
        parts = (x,) if second is None else (x, second)
        for name, part in zip(self.names, parts, strict=True):
            self.observer.note(name, part)
        return self.conv(x, second, *args, **kwargs)
