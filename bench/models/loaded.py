"""What a variant gives to the worker that times it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


class Unavailable(RuntimeError):
    """A variant that cannot run here; the message is the reason, for people."""


@dataclass(frozen=True)
class Loaded:
    """A denoiser that is ready to run.

    run      one forward, or one whole sampling
    seconds  what making it ready took, by stage; building the torch module does not count, it is the user's own
    peak_mb  peak memory of a stage that ran in another process
    note     what the record should say after the runs, as how much of the model ran as intended
    """

    run: Callable[[], torch.Tensor]
    seconds: dict[str, float]
    peak_mb: int = 0
    note: Callable[[], str] = lambda: ""
