"""Single-step DPM-Solver and DPM-Solver++: exponential Runge-Kutta in the half log signal-to-noise ratio."""

from fastdiff.process import Level, Process
from fastdiff.solvers.exponential import EXACT, psi
from fastdiff.solvers.row import Row, Solver, choose
from fastdiff.solvers.stages import Stage, between, one_stage, stage_rows

_TYPES = ("midpoint", "heun")


def block_rows(r: int, nodes: list[Level], history: str, solver_type: str, inner: str, step: int) -> list[Row]:
    """One step of order len(nodes) - 1 through these levels: the base, the inner nodes, and where it ends.

    solver_type  "midpoint" (the papers' default) or "heun" (the Taylor form)
    inner        second stage of order 3: "exact" (Lu et al. 2022, alg. 2), or the "same" rule as order 2 has (diffusers)

    A step of infinite h becomes first-order steps over the same nodes.
    """
    if one_stage(nodes[0], nodes[-1]):
        pairs = enumerate(zip(nodes[:-1], nodes[1:], strict=True))
        return [row for j, (at, to) in pairs for row in stage_rows(r + j, at, [Stage(to)], history, step)]
    base, h = nodes[0], nodes[-1].lam - nodes[0].lam
    ratios = [(node.lam - base.lam) / h for node in nodes[1:-1]]
    stages = [Stage(nodes[1])]
    if len(nodes) == 3:
        stages.append(Stage(nodes[2], second_weights(base, nodes[2], ratios[0], history, solver_type)))
    elif len(nodes) == 4:
        r1, r2 = ratios
        rule = "heun" if inner == "exact" else solver_type
        stages.append(Stage(nodes[2], second_weights(base, nodes[2], r1 / r2, history, rule)))
        stages.append(Stage(nodes[3], third_weights(base, nodes[3], r1, r2, history, solver_type)))
    return stage_rows(r, base, stages, history, step)


def _scaled_psi(base: Level, to: Level, history: str) -> list[float]:
    """The factors of h_0, of its slope and of half its curvature over the step."""
    h = to.lam - base.lam
    scale, z = (to.alpha, h) if history == "data" else (to.sigma, -h)
    return [scale * moment for moment in psi(z, 3)]


def second_weights(base: Level, to: Level, r1: float, history: str, solver_type: str) -> dict[int, float]:
    """Weights of the difference h_1 - h_0 with the inner node at the fraction r1."""
    psi0, psi1, _ = _scaled_psi(base, to, history)
    return {1: psi0 / (2.0 * r1) if solver_type == "midpoint" else psi1 / r1}


def third_weights(base: Level, to: Level, r1: float, r2: float, history: str, solver_type: str) -> dict[int, float]:
    _, psi1, psi2 = _scaled_psi(base, to, history)
    if solver_type == "midpoint":
        return {2: psi1 / r2}
    return {1: (psi1 * r2 - psi2) / (r1 * (r2 - r1)), 2: (psi2 - psi1 * r1) / (r2 * (r2 - r1))}


def single_rows(levels: list[Level], process: Process, *, order: int, history: str, solver_type: str) -> list[Row]:
    """`order` calls per step, with inner nodes at equal fractions of the step in lambda."""
    choose("solver_type", solver_type, _TYPES)
    rows: list[Row] = []
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        parts = [] if one_stage(at, to) else [between(process, at, to, j / order) for j in range(1, order)]
        rows += block_rows(len(rows), [at, *parts, to], history, solver_type, "exact", i)
    return rows


def order_plan(calls: int, order: int) -> list[int]:
    """Orders of the steps that use exactly `calls` model calls, the last ones low (Lu et al. 2022, app. D.4)."""
    if order == 3:
        whole, left = calls // 3, calls % 3
        if left == 0 and whole > 0:
            return [3] * (whole - 1) + [2, 1]
        return [3] * whole + [left] * (left > 0)
    return [order] * (calls // order) + [1] * (calls % order)


def planned_rows(
    levels: list[Level],
    process: Process,
    *,
    order: int,
    history: str,
    solver_type: str,
    inner: str,
    plan: tuple[int, ...] | None,
) -> list[Row]:
    """One call per level: steps of the planned orders, whose inner nodes are the levels that they pass.

    plan  order of every step, adding up to the number of calls; None is `order_plan`
    """
    choose("solver_type", solver_type, _TYPES), choose("inner", inner, ("exact", "same"))
    choose("order", order, (1, 2, 3)), choose("history", history, ("data", "noise"))
    calls = len(levels) - 1
    plan = order_plan(calls, order) if plan is None else plan
    if sum(plan) != calls or not set(plan) <= {1, 2, 3}:
        raise ValueError(f"dpm-fast: plan must hold orders 1 to 3 that add up to {calls}, got {list(plan)}")
    rows: list[Row] = []
    for step, count in enumerate(plan):
        start = len(rows)
        rows += block_rows(start, levels[start : start + count + 1], history, solver_type, inner, step)
    return rows


def _single(name: str, order: int, history: str) -> Solver:
    def rows(levels: list[Level], process: Process, *, solver_type: str = "midpoint") -> list[Row]:
        return single_rows(levels, process, order=order, history=history, solver_type=solver_type)

    options = {"solver_type": "midpoint"} if order > 1 else {}
    return Solver(name, rows, order=order, history=history, calls=order, exact=EXACT, options=options)


DPM_1S, DPM_2S, DPM_3S = (_single(f"dpm-{order}s", order, "noise") for order in (1, 2, 3))
DPMPP_2S, DPMPP_3S = (_single(f"dpmpp-{order}s", order, "data") for order in (2, 3))
DPM_FAST = Solver(
    "dpm-fast",
    planned_rows,
    order=2,  # the plan ends with a step of order 1 or 2, whose local error dominates
    history="noise",
    exact=EXACT,
    options={"order": 3, "history": "noise", "solver_type": "midpoint", "inner": "exact", "plan": None},
    refine=lambda options: {"order": min(options["order"], 2), "history": options["history"]},
)
SOLVERS = (DPM_1S, DPM_2S, DPM_3S, DPM_FAST, DPMPP_2S, DPMPP_3S)
