"""Multistage steps: every stage starts again from the step's base state, folded so that the current state is enough."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fastdiff.process import Level, Process
from fastdiff.solvers.row import Noise, Row


@dataclass(frozen=True)
class Stage:
    """Where a stage leads, and the weights of all predictions of its step but the first one.

    to       level of the stage's result
    weights  on predictions 1, 2, ... of the step; that of prediction 0 follows from the row invariants
    """

    to: Level
    weights: Mapping[int, float] = field(default_factory=dict)


def stage_rows(r: int, base: Level, stages: Sequence[Stage], history: str, step: int) -> list[Row]:
    """Rows r, r + 1, ... of one step from the state at `base`; each row calls the model and leads to its stage.

    A stage is x_j = A_j x + sum_k W_jk h_k with A_j = sigma_j / sigma (data history) or alpha_j / alpha (noise history), exact
    on constant predictions. As x = (x_i - sum_k W_ik h_k) / A_i, each row needs the state before it and predictions only.
    """
    rows, A_now, W_now, at = [], 1.0, {}, base
    for stage in stages:
        data = history == "data"
        A = stage.to.sigma / base.sigma if data else stage.to.alpha / base.alpha
        first = stage.to.alpha - A * base.alpha if data else stage.to.sigma - A * base.sigma
        W = {0: first - sum(stage.weights.values()), **stage.weights}
        ratio = A / A_now
        B = {r + k: W.get(k, 0.0) - ratio * W_now.get(k, 0.0) for k in {**W, **W_now}}
        rows.append(Row(at, stage.to, ratio, {k: v for k, v in B.items() if v != 0.0}, step=step))
        A_now, W_now, at = A, W, stage.to
    return rows


def level_at(process: Process, lam: float) -> Level:
    """The level of half log signal-to-noise ratio `lam`."""
    return process.levels([float(process.time_of_lam(lam))])[0]


def between(process: Process, at: Level, to: Level, r: float) -> Level:
    """The level a fraction r of the way from `at` to `to` in lambda."""
    return level_at(process, at.lam + r * (to.lam - at.lam))


def one_stage(at: Level, to: Level) -> bool:
    """Whether h is infinite, so that the step has order 1 in closed form."""
    return not math.isfinite(to.lam - at.lam)


def quieter(level: Level, kappa: float) -> Level:
    """`level` with its noise-to-signal ratio replaced by `kappa`: where an ancestral step stands before fresh noise."""
    return replace(level, sigma=level.alpha * kappa)


def ancestral_split(at: Level, to: Level, eta: float) -> tuple[float, float]:
    """(down, up) noise-to-signal ratios: integrate to `down`, then add fresh noise of deviation `up` (k-diffusion's rule)."""
    if at.alpha == 0.0:
        up = min(to.kappa, eta * to.kappa)
    else:
        up = min(to.kappa, eta * to.kappa * math.sqrt(max(1.0 - (to.kappa / at.kappa) ** 2, 0.0)))
    return math.sqrt(max(to.kappa**2 - up**2, 0.0)), up


def with_noise(row: Row, to: Level, noise: Sequence[Noise]) -> Row:
    """`row`, leading to `to` by adding noise at the end; terms of zero scale are dropped."""
    return replace(row, to=to, noise=(*row.noise, *(n for n in noise if n.scale != 0.0)))
