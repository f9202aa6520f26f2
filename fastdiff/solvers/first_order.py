"""First-order solvers: one affine row per step (affine-process rows with a chosen amount of fresh noise)."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fastdiff.process import Level, Process
from fastdiff.solvers.row import RISING, Noise, Row, Solver, choose

_EXACT = frozenset({"data", "noise", "variance", "mean"})


def affine_row(r: int, at: Level, to: Level, noise_scale: float = 0.0, step: int | None = None) -> Row:
    """The row that keeps all marginals when h is the exact x0: x' = A x + B h + D u + C z with C = noise_scale.

    A = sqrt(sigma'^2 - C^2) / sigma; every endpoint's weight follows, B = alpha' - A alpha and D = mean' - A mean.
    """
    A = float(np.sqrt(max(to.sigma**2 - noise_scale**2, 0.0)) / at.sigma)
    noise = (Noise(noise_scale, r),) if noise_scale > 0.0 else ()
    B, D = to.alpha - A * at.alpha, to.mean - A * at.mean
    return Row(at, to, A, {r: B}, noise=noise, D=D, step=r if step is None else step)


def ddim_noise_scale(at: Level, to: Level, eta: float) -> float:
    """Standard deviation of the fresh noise of DDIM(eta): eta sigma' sqrt(1 - exp(-2h)) (Song et al. 2021, eq. 16)."""
    if eta == 0.0:
        return 0.0
    ratio = (to.kappa / at.kappa) ** 2  # exp(-2h)
    if ratio > 1.0:
        raise ValueError(RISING)
    return eta * to.sigma * float(np.sqrt(1.0 - ratio))


def ddim_rows(levels: list[Level], process: Process, *, eta: float, clip: str) -> list[Row]:
    """DDIM(eta): eta = 0 is the ODE, eta = 1 is DDPM with the posterior variance.

    clip   which noise accompanies a clamped x0: "consistent" re-derives it from x and the clamped x0, "reference" takes the
           model's own, as the published code does by default; equal without a clamp
    """
    choose("clip", clip, ("consistent", "reference"))
    rows = []
    for r, (at, to) in enumerate(_pairs(levels)):
        row = affine_row(r, at, to, ddim_noise_scale(at, to, eta))
        rows.append(row if clip == "consistent" else replace(row, B={r: to.alpha}, R=-row.A * at.alpha))
    return rows


def ddpm_rows(levels: list[Level], process: Process, *, variance: str) -> list[Row]:
    """Ancestral sampling with the posterior variance ("small") or that of the forward step ("large"; Ho et al. 2020, 3.2)."""
    scale = choose(
        "variance", variance, {"small": lambda at, to: ddim_noise_scale(at, to, 1.0), "large": _forward_noise}
    )
    rows = []
    for r, (at, to) in enumerate(_pairs(levels)):
        mean, C = affine_row(r, at, to, ddim_noise_scale(at, to, 1.0)), scale(at, to)
        rows.append(replace(mean, noise=(Noise(C, r),) if C > 0.0 else ()))
    return rows


def _forward_noise(at: Level, to: Level) -> float:
    """Deviation of the forward transition from `to` to `at`; none in the step that ends at clean data."""
    if to.sigma == 0.0:
        return 0.0
    return float(np.sqrt(max(at.sigma**2 - (at.alpha / to.alpha * to.sigma) ** 2, 0.0)))


def euler_rows(levels: list[Level], process: Process) -> list[Row]:
    """Euler in the frame where alpha is 1 (Karras et al. 2022, alg. 1 without correction)."""
    return [affine_row(r, at, to) for r, (at, to) in enumerate(_pairs(levels))]


def euler_ancestral_rows(levels: list[Level], process: Process, *, eta: float, s_noise: float) -> list[Row]:
    """Euler down to a lower level, then fresh noise: in the frame alpha = 1 the noise is eta sigma' sqrt(1 - sigma'^2 / sigma^2)."""
    rows = []
    for r, (at, to) in enumerate(_pairs(levels)):
        up = min(ddim_noise_scale(at, to, eta), to.sigma)
        row = affine_row(r, at, to, up)
        rows.append(replace(row, noise=(Noise(up * s_noise, r),) if up * s_noise > 0.0 else ()))
    return rows


def flow_euler_rows(levels: list[Level], process: Process) -> list[Row]:
    """Euler in the process's own time: x' = x + (t' - t) dx/dt. Equal to DDIM where alpha and sigma are linear in t."""
    return [Row(at, to, 1.0, {r: to.t - at.t}, step=r) for r, (at, to) in enumerate(_pairs(levels))]


def _pairs(levels: list[Level]):
    return zip(levels[:-1], levels[1:], strict=True)


def _ddpm_exact(options: Mapping) -> dict:
    return {"exact": _EXACT if options["variance"] == "small" else _EXACT - {"variance"}}


def _ancestral_exact(options: Mapping) -> dict:
    return {"exact": _EXACT if options["s_noise"] == 1.0 else _EXACT - {"variance", "noise"}}


DDPM = Solver("ddpm", ddpm_rows, order=1, options={"variance": "small"}, exact=_EXACT, refine=_ddpm_exact)
DDIM = Solver("ddim", ddim_rows, order=1, options={"eta": 0.0, "clip": "consistent"}, exact=_EXACT)
EULER = Solver("euler", euler_rows, order=1, exact=_EXACT)
EULER_ANCESTRAL = Solver(
    "euler-a",
    euler_ancestral_rows,
    order=1,
    options={"eta": 1.0, "s_noise": 1.0},
    exact=_EXACT,
    refine=_ancestral_exact,
)
FLOW_EULER = Solver(
    "flow-euler", flow_euler_rows, order=1, history="flow", exact=frozenset({"mean"}), spacing="uniform"
)
SOLVERS = (DDPM, DDIM, EULER, EULER_ANCESTRAL, FLOW_EULER)
