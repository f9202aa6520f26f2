"""What `accelerate` did to each layer, and why."""

from dataclasses import dataclass, field

import torch


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
