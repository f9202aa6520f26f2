"""Two-stage solvers in sigma / alpha (Heun of EDM with churn, dpm_2) or in time (flow Heun and midpoint)."""

import math
from dataclasses import replace

from fastdiff.process import Level, Process
from fastdiff.solvers.exponential import EXACT
from fastdiff.solvers.row import SECOND_STREAM, Noise, Row, Solver, choose
from fastdiff.solvers.stages import (
    Stage,
    ancestral_split,
    between,
    level_at,
    one_stage,
    quieter,
    stage_rows,
    with_noise,
)


def heun_rows(
    levels: list[Level],
    process: Process,
    *,
    s_churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
    middle: str = "end",
) -> list[Row]:
    """Second-order steps with churn (Karras et al. 2022, alg. 2), Euler where a step ends at zero noise.

    s_churn       total churn: each step first raises sigma / alpha by min(s_churn / steps, sqrt(2) - 1) within [s_min, s_max]
    s_noise       factor on the churn noise
    middle        where the second call is: "end" (Heun) or "log" (the geometric middle, dpm_2)

    The churn noise of a step is the last noise term of the row before it; the first step's raises the initial level.
    """
    steps = len(levels) - 1
    factors = [_churn(level, s_churn / steps, s_min, s_max) for level in levels[:-1]] + [1.0]
    hats = [_raised(process, level, factor) for level, factor in zip(levels, factors, strict=True)]
    rows: list[Row] = []
    for i in range(steps):
        rows += _second_order(len(rows), hats[i], levels[i + 1], process, middle, i)
        rows[-1] = _add_churn(rows[-1], hats[i + 1], s_noise)
    return rows


def _second_order(r: int, at: Level, to: Level, process: Process, middle: str, step: int) -> list[Row]:
    """One step whose final slope is the mean of both ends, or the slope in the middle."""
    if one_stage(at, to):
        return stage_rows(r, at, [Stage(to)], "data", step)
    if middle == "end":
        between_level, weight = to, (at.kappa - to.kappa) / (2.0 * to.kappa)
    else:
        between_level = between(process, at, to, 0.5)
        weight = (at.kappa - to.kappa) / between_level.kappa
    return stage_rows(r, at, [Stage(between_level), Stage(to, {1: to.alpha * weight})], "data", step)


def _churn(level: Level, share: float, s_min: float, s_max: float) -> float:
    return 1.0 + min(share, math.sqrt(2.0) - 1.0) if s_min <= level.kappa <= s_max else 1.0


def _raised(process: Process, level: Level, factor: float) -> Level:
    if factor == 1.0 or not math.isfinite(level.lam):
        return level
    raised = level_at(process, level.lam - math.log(factor))
    return raised if raised.kappa > level.kappa else level  # the process ends before the raised level


def _add_churn(row: Row, hat: Level, s_noise: float) -> Row:
    """The row continued from its end to the noisier level `hat`: a change of scale and fresh noise."""
    if hat == row.to:
        return row
    scale = hat.alpha / row.to.alpha
    grown = hat.alpha * math.sqrt(hat.kappa**2 - row.to.kappa**2) * s_noise
    B = {k: v * scale for k, v in row.B.items()}
    row = replace(row, A=row.A * scale, B=B)
    return with_noise(row, hat, [Noise(grown, row.step, SECOND_STREAM)])


def dpm2_ancestral_rows(levels: list[Level], process: Process, *, eta: float, s_noise: float) -> list[Row]:
    """dpm_2 towards a quieter level, then fresh noise (k-diffusion's sample_dpm_2_ancestral)."""
    rows: list[Row] = []
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        down, up = ancestral_split(at, to, eta)
        rows += _second_order(len(rows), at, quieter(to, down), process, "log", i)
        rows[-1] = with_noise(rows[-1], to, [Noise(to.alpha * up * s_noise, i)])
    return rows


def flow_rows(levels: list[Level], process: Process, *, middle: str) -> list[Row]:
    """Second-order steps in time on the velocity dx/dt: "end" is Heun, "middle" the midpoint rule; Euler at the end.

    Exact on constant predictions only where the process is linear in time, as rectified flow is.
    """
    choose("middle", middle, ("end", "middle"))
    rows: list[Row] = []
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        r, dt = len(rows), to.t - at.t
        if to.sigma == 0.0:
            rows.append(Row(at, to, 1.0, {r: dt}, step=i))
        elif middle == "end":
            rows.append(Row(at, to, 1.0, {r: dt}, step=i))
            rows.append(Row(to, to, 1.0, {r: -0.5 * dt, r + 1: 0.5 * dt}, step=i))
        else:
            half = process.levels([0.5 * (at.t + to.t)])[0]
            rows.append(Row(at, half, 1.0, {r: 0.5 * dt}, step=i))
            rows.append(Row(half, to, 1.0, {r: -0.5 * dt, r + 1: dt}, step=i))
    return rows


def _variance(options) -> dict:
    churned = options.get("s_churn", 1.0) > 0.0 and options["s_noise"] != 1.0
    return {"exact": EXACT - {"variance"} if churned else EXACT}


_CHURN = {"s_churn": 0.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.0}
_KARRAS = {"exact": EXACT, "calls": 2, "spacing": "karras", "refine": _variance}


def _dpm2_rows(levels: list[Level], process: Process, **options) -> list[Row]:
    return heun_rows(levels, process, middle="log", **options)


HEUN = Solver("heun", heun_rows, order=2, options=_CHURN, **_KARRAS)
# ImageNet-64 settings of Karras et al. 2022, table 5
EDM = Solver(
    "edm",
    heun_rows,
    order=2,
    options={"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
    **{**_KARRAS, "exact": EXACT - {"variance"}},
)
DPM2 = Solver("dpm2", _dpm2_rows, order=2, options=_CHURN, **_KARRAS)
DPM2_A = Solver("dpm2-a", dpm2_ancestral_rows, order=2, options={"eta": 1.0, "s_noise": 1.0}, **_KARRAS)
_FLOW = {"history": "flow", "calls": 2, "exact": frozenset(), "spacing": "uniform"}
FLOW_HEUN = Solver("flow-heun", flow_rows, order=2, options={"middle": "end"}, **_FLOW)
FLOW_MIDPOINT = Solver("flow-midpoint", flow_rows, order=2, options={"middle": "middle"}, **_FLOW)
SOLVERS = (HEUN, EDM, DPM2, DPM2_A, FLOW_HEUN, FLOW_MIDPOINT)
