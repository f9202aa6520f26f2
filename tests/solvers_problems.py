"""Problems with known exact solutions, and an executor of solver rows that shares nothing with the kernel."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from fastdiff.process import PREDICTIONS, Level, VPLinear


def lambda_levels(n: int, low: float = -3.0, high: float = 3.0, process=None) -> list[Level]:
    """n + 1 levels uniform in lambda, with exact alpha and sigma (variance preserving unless a process is given)."""
    lam = np.linspace(low, high, n + 1)
    if process is not None:
        return process.levels(process.time_of_lam(lam))
    process = VPLinear()
    alpha, sigma = 1.0 / np.sqrt(1.0 + np.exp(-2.0 * lam)), 1.0 / np.sqrt(1.0 + np.exp(2.0 * lam))
    t = process.time_of_lam(lam)
    rates = process.rates(t)
    return [Level(*map(float, row)) for row in zip(t, alpha, sigma, t, *rates, strict=True)]


def prediction(history: str, level: Level, x, data):
    """A history entry of this type, made from exact data."""
    noise = (x - level.alpha * data) / level.sigma if level.sigma > 0.0 else np.zeros_like(x)
    p, q, r = PREDICTIONS[history](level)
    return p * data + q * noise + r * x


def execute(rows, history, denoise, x, noise=None, exact=None, exact_steps=0):
    """Runs rows literally: x' = A x + sum B h + R h + sum X x_k + noise. Returns the final state.

    denoise(level, x) -> data; noise(step, stream) -> array; exact(level) -> the state to put after the first `exact_steps`.
    """
    h, states = {}, {}
    for r, row in enumerate(rows):
        states[r], h[r] = x, prediction(history, row.at, x, denoise(row.at, x))
        new = row.A * x + row.R * h[r]
        for k, value in row.B.items():
            new = new + value * h[k]
        for k, value in row.X.items():
            new = new + value * states[k]
        for term in row.noise:
            new = new + term.scale * noise(term.step, term.stream)
        x = new if r >= exact_steps else exact(row.to)
    return x


@dataclass(frozen=True)
class Mixture:
    """Data from a mixture of normal distributions on the line; the exact flow keeps quantiles."""

    means: tuple[float, ...] = (-1.1, 0.35, 1.3)
    deviations: tuple[float, ...] = (0.45, 0.35, 0.5)
    weights: tuple[float, ...] = (0.3, 0.4, 0.3)

    def denoise(self, level: Level, x):
        """E[x0 | x]."""
        m, s, w = (np.array(v)[:, None] for v in (self.means, self.deviations, self.weights))
        variance = level.alpha**2 * s**2 + level.sigma**2
        offset = x - level.alpha * m
        log = np.log(w) - 0.5 * np.log(variance) - 0.5 * offset**2 / variance
        p = np.exp(log - log.max(axis=0))
        return (p * (m + level.alpha * s**2 / variance * offset)).sum(0) / p.sum(0)

    def quantile(self, level: Level, q):
        """Exact states of the probability-flow ODE: the quantiles q of the marginal, by bisection."""
        m, s, w = (np.array(v)[:, None] for v in (self.means, self.deviations, self.weights))
        deviation = np.sqrt(level.alpha**2 * s**2 + level.sigma**2)
        low, high = np.full_like(q, -8.0), np.full_like(q, 8.0)
        for _ in range(56):
            middle = 0.5 * (low + high)
            below = (w * ndtr((middle - level.alpha * m) / deviation)).sum(0) < q
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return 0.5 * (low + high)


@dataclass(frozen=True)
class Gaussian:
    """Data from N(m, s^2). States are affine in (1, x_T, z_1, z_2, ...), so mean and variance are exact."""

    m: float = 0.7
    s: float = 0.5

    def marginal(self, level: Level) -> tuple[float, float]:
        """Mean and variance of x at a level."""
        return level.alpha * self.m, level.alpha**2 * self.s**2 + level.sigma**2

    def denoise(self, level: Level, x):
        """E[x0 | x], for an array whose first axis are the coefficients of (1, x_T, z...)."""
        _, variance = self.marginal(level)
        data = level.alpha * self.s**2 / variance * x
        data[0] += level.sigma**2 * self.m / variance
        return data

    def final_moments(self, rows, history, start=None) -> tuple[float, float]:
        """Exact mean and variance after the rows, started at the exact marginal (mean, variance)."""
        mean, variance = self.marginal(rows[0].at) if start is None else start
        keys = sorted({(n.step, n.stream) for row in rows for n in row.noise})
        basis = np.eye(2 + len(keys))
        x = np.sqrt(variance) * basis[1] + mean * basis[0]
        x = execute(rows, history, self.denoise, x, lambda *key: basis[2 + keys.index(key)])
        return float(x[0]), float((x[1:] ** 2).sum())

    def errors(self, rows, history) -> tuple[float, float]:
        """Errors of the final mean and variance."""
        got, want = self.final_moments(rows, history), self.marginal(rows[-1].to)
        return abs(got[0] - want[0]), abs(got[1] - want[1])


def slopes(errors) -> np.ndarray:
    """Orders of convergence between successive halvings of the step."""
    errors = np.asarray(errors)
    return np.log2(errors[:-1] / errors[1:])
