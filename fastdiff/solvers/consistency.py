"""Consistency-type sampling: the network's data estimate is final, and steps only decide how much is renoised.

Stochastic sCM steps on TrigFlow are "lcm" rows (x' = cos t' x0 + sin t' z), its deterministic ones are "ddim" rows.
"""

import math

from fastdiff.process import Level, Process
from fastdiff.solvers.first_order import affine_row
from fastdiff.solvers.row import Noise, Row, Solver


def lcm_rows(levels: list[Level], process: Process, *, boundary: tuple[float, float] | None) -> list[Row]:
    """x' = alpha' x0 + sigma' z with the boundary scaling of latent consistency models (Luo et al. 2023, eq. 9).

    boundary  (sigma_data, time scaling) of c_skip and c_out, which mix the state into x0; None trusts x0 alone
    """
    rows = []
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        skip, out = 0.0, 1.0
        if boundary is not None:
            sigma_data, scaled = boundary[0], at.time * boundary[1]
            norm = math.hypot(scaled, sigma_data)
            skip, out = (sigma_data / norm) ** 2, scaled / norm
        noise = (Noise(to.sigma, i),) if to.sigma > 0.0 else ()
        rows.append(Row(at, to, to.alpha * skip, {i: to.alpha * out}, noise=noise, step=i))
    return rows


def cm_rows(levels: list[Level], process: Process) -> list[Row]:
    """Multistep consistency sampling: x' = x0 + sqrt(sigma'^2 - sigma_min^2) z at alpha = 1 (Song et al. 2023, alg. 1).

    The data of a consistency model stands at the smallest noise level, so the last level is sigma_min.
    """
    rows, least = [], levels[-1].kappa
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        grown = to.alpha * math.sqrt(max(to.kappa**2 - least**2, 0.0))
        noise = (Noise(grown, i),) if grown > 0.0 else ()
        rows.append(Row(at, to, 0.0, {i: to.alpha}, noise=noise, step=i))
    return rows


def ctm_rows(levels: list[Level], process: Process, *, gamma: float) -> list[Row]:
    """Gamma-sampling of consistency trajectory models (Kim et al. 2023, alg. 3).

    Each step jumps to sqrt(1 - gamma^2) of the way above the smallest level and renoises; gamma = 0 is deterministic,
    gamma = 1 multistep consistency. The second time argument of such models is not part of a row.
    """
    rows, least = [], levels[-1].kappa
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        jump = math.sqrt(1.0 - gamma**2) * (to.kappa - least) + least
        grown = to.alpha * math.sqrt(max(to.kappa**2 - jump**2, 0.0))
        rows.append(affine_row(i, at, to, grown if i + 2 < len(levels) else 0.0))
    return rows


def tcd_rows(levels: list[Level], process: Process, *, gamma: float) -> list[Row]:
    """Trajectory consistency distillation: jump to time floor((1 - gamma) t'), then renoise (Zheng et al. 2024, eq. 24)."""
    rows = []
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        grown = 0.0
        if to.sigma > 0.0 and i + 2 < len(levels):
            time = (1.0 - gamma) * to.t
            jump = process.levels([math.floor(time) if float(to.t).is_integer() else time])[0]
            grown = to.alpha * math.sqrt(max(to.kappa**2 - jump.kappa**2, 0.0))
        rows.append(affine_row(i, at, to, grown))
    return rows


# order 0: the renoised share of a step does not shrink with it, so nothing converges unless the jumps are exact
_AFFINE = frozenset({"data", "noise", "variance", "mean"})
LCM = Solver(
    "lcm",
    lcm_rows,
    order=0,
    options={"boundary": None},
    exact=frozenset({"data", "variance"}),
    refine=lambda options: {"exact": frozenset() if options["boundary"] else frozenset({"data", "variance"})},
)
CM = Solver("cm", cm_rows, order=0, exact=frozenset({"data"}), spacing="karras", final="t_min")
CTM = Solver("ctm", ctm_rows, order=0, options={"gamma": 0.2}, exact=_AFFINE, spacing="karras", final="t_min")
TCD = Solver("tcd", tcd_rows, order=0, options={"gamma": 0.3}, exact=_AFFINE)
SOLVERS = (LCM, CM, CTM, TCD)
