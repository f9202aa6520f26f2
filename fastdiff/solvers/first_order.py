"""First-order solvers: one affine row per step (affine-process rows with a chosen amount of fresh noise)."""

import numpy as np

from fastdiff.process import Level, Process
from fastdiff.solvers.row import Noise, Row, Solver


def affine_row(r: int, at: Level, to: Level, noise_scale: float = 0.0, step: int | None = None) -> Row:
    """The row that keeps all marginals when h is the exact x0: x' = A x + B h + D u + C z with C = noise_scale.

    A = sqrt(sigma'^2 - C^2) / sigma; every endpoint's weight follows, B = alpha' - A alpha and D = mean' - A mean.
    """
    A = np.sqrt(max(to.sigma**2 - noise_scale**2, 0.0)) / at.sigma
    noise = (Noise(noise_scale, r),) if noise_scale > 0.0 else ()
    B, D = to.alpha - A * at.alpha, to.mean - A * at.mean
    return Row(at, to, A, {r: B}, noise=noise, D=D, step=r if step is None else step)


def ddim_noise_scale(at: Level, to: Level, eta: float) -> float:
    """Standard deviation of the fresh noise of DDIM(eta): eta sigma' sqrt(1 - exp(-2h)) (Song et al. 2021, eq. 16)."""
    ratio = (to.kappa / at.kappa) ** 2  # exp(-2h)
    return eta * to.sigma * float(np.sqrt(max(1.0 - ratio, 0.0)))


def ddim_rows(levels: list[Level], process: Process, *, eta: float) -> list[Row]:
    """DDIM(eta): eta = 0 is the ODE, eta = 1 is DDPM with the posterior variance."""
    pairs = zip(levels[:-1], levels[1:], strict=True)
    return [affine_row(r, at, to, ddim_noise_scale(at, to, eta)) for r, (at, to) in enumerate(pairs)]


DDIM = Solver("ddim", ddim_rows, order=1, options={"eta": 0.0}, exact=frozenset({"data", "noise", "variance"}))
