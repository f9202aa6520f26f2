"""Two-stage solvers that add fresh noise in every step: dpmpp_2s_ancestral and dpmpp_sde."""

import math

from fastdiff.process import Level, Process
from fastdiff.solvers.exponential import EXACT
from fastdiff.solvers.row import SECOND_STREAM, Noise, Row, Solver
from fastdiff.solvers.stages import Stage, ancestral_split, between, one_stage, quieter, stage_rows, with_noise


def dpmpp_2s_ancestral_rows(levels: list[Level], process: Process, *, eta: float, s_noise: float) -> list[Row]:
    """DPM-Solver++(2S) towards a quieter level, then fresh noise (k-diffusion's sample_dpmpp_2s_ancestral)."""
    rows: list[Row] = []
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        down, up = ancestral_split(at, to, eta)
        end = quieter(to, down)
        if one_stage(at, end):
            stages = [Stage(end)]
        else:  # with the inner node in the middle, the first prediction drops out of the step
            weight = end.alpha - end.sigma / at.sigma * at.alpha
            stages = [Stage(between(process, at, end, 0.5)), Stage(end, {1: weight})]
        rows += stage_rows(len(rows), at, stages, "data", i)
        rows[-1] = with_noise(rows[-1], to, [Noise(to.alpha * up * s_noise, i)])
    return rows


def dpmpp_sde_rows(levels: list[Level], process: Process, *, eta: float, s_noise: float, r: float) -> list[Row]:
    """DPM-Solver++ (stochastic), one inner node at the fraction r (k-diffusion's sample_dpmpp_sde).

    The noise of the inner node and of the step are increments of one Brownian path in sigma / alpha, so the second is
    rho z1 + sqrt(1 - rho^2) z' with rho^2 the fraction of the step's noise drop before the inner node. Independent
    noise would lower the weak order to 1.
    """
    rows: list[Row] = []
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        first = len(rows)
        if one_stage(at, to):
            rows += stage_rows(first, at, [Stage(to)], "data", i)
            continue
        node = between(process, at, to, r)
        down, up = ancestral_split(at, node, eta)
        (row,) = stage_rows(first, at, [Stage(quieter(node, down))], "data", i)
        rows.append(with_noise(row, node, [Noise(node.alpha * up * s_noise, i)]))
        down, up = ancestral_split(at, to, eta)
        X = to.alpha * down / at.sigma
        B = to.alpha - X * at.alpha
        mix, rho2 = 1.0 / (2.0 * r), (at.kappa - node.kappa) / (at.kappa - to.kappa)
        row = Row(node, to, 0.0, {first: (1.0 - mix) * B, first + 1: mix * B}, {first: X}, step=i)
        row = Row(row.at, row.to, row.A, {k: v for k, v in row.B.items() if v != 0.0}, row.X, step=i)
        C = to.alpha * up * s_noise
        noise = [Noise(C * math.sqrt(rho2), i), Noise(C * math.sqrt(1.0 - rho2), i, SECOND_STREAM)]
        rows.append(with_noise(row, to, noise))
    return rows


def _variance(options) -> dict:
    return {"exact": EXACT if options["s_noise"] == 1.0 else EXACT - {"variance"}}


_SHARED = {"calls": 2, "exact": EXACT, "refine": _variance}
_NOISE = {"eta": 1.0, "s_noise": 1.0}
DPMPP_2S_A = Solver("dpmpp-2s-a", dpmpp_2s_ancestral_rows, order=2, options=_NOISE, **_SHARED)
DPMPP_SDE = Solver("dpmpp-sde", dpmpp_sde_rows, order=2, options={**_NOISE, "r": 0.5}, **_SHARED)
SOLVERS = (DPMPP_2S_A, DPMPP_SDE)
