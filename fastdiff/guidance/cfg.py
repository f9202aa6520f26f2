"""Classifier-free guidance as branch weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance (Ho and Salimans 2022): scale * conditional + (1 - scale) * negative.

    scale     one number, or one per solver step (the last one is kept when there are more steps)
    interval  (low, high) in units of t / t_max: outside it the scale is 1 (Kynkaanniemi et al. 2024)

    Where the scale is 1 the negative branch is not evaluated.
    """

    scale: float | tuple[float, ...] = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        scales = tuple(self.scale) if isinstance(self.scale, Sequence) else (float(self.scale),)
        if not scales or not all(math.isfinite(s) for s in scales):
            raise ValueError(f"CFG: scale must be finite numbers, got {self.scale!r}")
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"CFG: interval must satisfy 0 <= low <= high <= 1, got {self.interval!r}")
        object.__setattr__(self, "scale", scales if len(scales) > 1 else float(scales[0]))

    @property
    def branches(self) -> int:
        """Number of model branches: 1 where the scale is 1 throughout, else 2."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        return 1 if all(s == 1.0 for s in scales) else 2

    def weights(self, step: int, fraction: float) -> tuple[float, ...]:
        """Weights of (conditional, negative) at a solver step whose time is `fraction` of t_max."""
        scale = self.scale[min(step, len(self.scale) - 1)] if isinstance(self.scale, tuple) else self.scale
        if not self.interval[0] <= fraction <= self.interval[1]:
            scale = 1.0
        return (scale, 1.0 - scale)[: self.branches]
