"""Data whose exact denoiser and exact probability flow are known: independent mixtures of normal distributions per element."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.process import Level, Process, convert

_BISECTIONS = 90  # from +-20 deviations to below float64 rounding


@dataclass(frozen=True)
class GaussianMixture:
    """Every element of the data is drawn from sum_k weights_k N(means_k, deviations_k^2), independently."""

    means: tuple[float, ...] = (-1.1, 0.35, 1.3)
    deviations: tuple[float, ...] = (0.45, 0.35, 0.5)
    weights: tuple[float, ...] = (0.3, 0.4, 0.3)

    def __post_init__(self):
        if not len(self.means) == len(self.deviations) == len(self.weights) or abs(sum(self.weights) - 1.0) > 1e-9:
            raise ValueError("GaussianMixture: needs as many deviations and weights as means, weights adding up to 1")

    def denoise(self, level: Level, x: torch.Tensor) -> torch.Tensor:
        """E[x0 | x] at a level. x  [...] float64"""
        m, s, w = (
            torch.tensor(v, dtype=x.dtype, device=x.device) for v in (self.means, self.deviations, self.weights)
        )
        variance = level.alpha**2 * s**2 + level.sigma**2
        offset = x[..., None] - level.alpha * m
        p = torch.softmax(w.log() - 0.5 * variance.log() - 0.5 * offset**2 / variance, dim=-1)
        return (p * (m + level.alpha * s**2 / variance * offset)).sum(-1)

    def below(self, level: Level, x: torch.Tensor) -> torch.Tensor:
        """Probability that an element of the state at a level is below x."""
        m, s, w = (
            torch.tensor(v, dtype=x.dtype, device=x.device) for v in (self.means, self.deviations, self.weights)
        )
        deviation = torch.sqrt(level.alpha**2 * s**2 + level.sigma**2)
        return (w * torch.special.ndtr((x[..., None] - level.alpha * m) / deviation)).sum(-1)

    def flow(self, at: Level, to: Level, x: torch.Tensor) -> torch.Tensor:
        """The probability flow from level to level, in closed form: it keeps quantiles. x  [...] float64"""
        if len(self.means) == 1:
            m, s = self.means[0], self.deviations[0]
            before, after = (math.hypot(v.alpha * s, v.sigma) for v in (at, to))
            return to.alpha * m + after / before * (x - at.alpha * m)
        wanted = self.below(at, x)
        low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            short = self.below(to, middle) < wanted
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return 0.5 * (low + high)

    def net(self, process: Process, prediction: str | tuple[float, float, float] = "noise") -> "ExactNet":
        """The perfect network of this data, for `Sampler(net, prediction, process)`."""
        return ExactNet(self, process, prediction)


def gaussian(mean: float = 0.7, deviation: float = 0.5) -> GaussianMixture:
    """Data from one normal distribution: every quantity above is affine in x."""
    return GaussianMixture((mean,), (deviation,), (1.0,))


class ExactNet:
    """net(x, t) -> prediction, exact. x is the scaled state that a network receives, t [M] the model's time."""

    def __init__(self, data: GaussianMixture, process: Process, prediction: str | tuple[float, float, float]):
        self.data, self.process, self.prediction = data, process, prediction

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for value in t.unique().tolist():
            rows = t == value
            level = self._level(value)
            state = x[rows].double() / self.process.input_scale(level)
            out[rows] = self._predict(level, state).to(x.dtype)
        return out

    def _predict(self, level: Level, x: torch.Tensor) -> torch.Tensor:
        a, b, _ = convert("data", self.prediction, level)
        return a * x + b * self.data.denoise(level, x)

    def _level(self, model_time: float) -> Level:
        """The level whose model time is this, by bisection: model times rise with t."""
        low, high = 0.0, float(self.process.t_max)
        with np.errstate(divide="ignore"):
            for _ in range(_BISECTIONS):
                middle = 0.5 * (low + high)
                early = float(self.process.model_time(np.array(middle))) < model_time
                low, high = (middle, high) if early else (low, middle)
        return self.process.levels([0.5 * (low + high)])[0]
