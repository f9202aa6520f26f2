"""What `accelerate` did to each layer, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastdiff.cache import Cache


@dataclass(frozen=True)
class Mode:
    """In which numbers a model runs.

    weights    of matrix products: float32, bfloat16 or int8 (one scale per output channel)
    stream     what kernels hand to each other
    attention  precision of `ops.attention`
    """

    weights: torch.dtype
    stream: torch.dtype
    attention: str


MODES = {
    "exact": Mode(torch.float32, torch.float32, "f32"),
    "bf16": Mode(torch.bfloat16, torch.bfloat16, "bf16"),
    "w8a8": Mode(torch.int8, torch.bfloat16, "bf16"),
}
ATTENTION = ("f32", "bf16", "int8")
DETERMINISTIC = ("off", "run", "batch")


@dataclass(frozen=True)
class Settings:
    """How a module is accelerated; see `fastdiff.accelerate` for what each setting means."""

    mode: str = "exact"
    attention: str | None = None
    spare: Mapping[str, str] | Sequence[str] = ()
    exact_time: bool | None = None
    keep_original: bool = True
    strict: bool = False
    deterministic: str = "run"
    cache: Cache | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"accelerate: unknown mode {self.mode!r}; known are {', '.join(MODES)}")
        if self.attention not in (None, *ATTENTION):
            raise ValueError(f"accelerate: unknown attention {self.attention!r}; known are {', '.join(ATTENTION)}")
        if self.deterministic not in DETERMINISTIC:
            known = ", ".join(DETERMINISTIC)
            raise ValueError(f"accelerate: unknown deterministic {self.deterministic!r}; known are {known}")
        if not isinstance(self.cache, Cache | None):
            raise TypeError(f"accelerate: cache must be a fastdiff.Cache or None, got {type(self.cache).__name__}")
        if self.exact_time and self.deterministic == "batch":
            raise ValueError(
                "accelerate: exact_time=True ties rows to their batch; leave it out for deterministic='batch'"
            )

    @property
    def numbers(self) -> Mode:
        """The mode's numbers, with the attention that was asked for."""
        mode = MODES[self.mode]
        return mode if self.attention is None else replace(mode, attention=self.attention)

    @property
    def spared(self) -> dict[str, str]:
        """Names of layers that stay in floating point, and why."""
        return dict(self.spare) if isinstance(self.spare, Mapping) else dict.fromkeys(self.spare, "asked for")

    @property
    def shares_time(self) -> bool:
        """Whether temporal rows belong to the batch that asks for them."""
        return (self.mode == "exact" and self.deterministic != "batch") if self.exact_time is None else self.exact_time


@dataclass(frozen=True)
class LayerRecord:
    """One layer: its name in the module, what it runs as now, and the reason where that is not the mode's usual."""

    name: str
    runs: str
    reason: str = ""


@dataclass
class Record:
    """Collects what happens to the layers of a module while it is lowered.

    layers  in the order in which they were met
    nbytes  of packed weights
    """

    layers: list[LayerRecord] = field(default_factory=list)
    nbytes: int = 0

    def add(self, name: str, runs: str, reason: str = "", nbytes: int = 0) -> None:
        """Notes that the layer `name` runs as `runs`."""
        self.layers.append(LayerRecord(name, runs, reason))
        self.nbytes += nbytes


class UnsupportedError(ValueError):
    """A module that cannot be lowered, with the reason."""
