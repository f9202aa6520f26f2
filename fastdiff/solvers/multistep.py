"""Multistep DPM-Solver and DPM-Solver++, as ODE and as SDE solvers (Lu et al. 2022; k-diffusion's eta)."""

from collections.abc import Mapping

from fastdiff.process import Level, Process
from fastdiff.solvers.exponential import EXACT, SECOND, THIRD, Rule, exponential_rows, falling_orders
from fastdiff.solvers.row import Row, Solver, choose

_FALLING = {"lower_order_below": 15, "euler_at_final": False}  # diffusers lowers the order of runs under 15 steps


def dpm_rows(
    levels: list[Level],
    process: Process,
    *,
    order: int,
    history: str,
    solver_type: str = "midpoint",
    third: str = "compat",
    eta: float = 0.0,
    s_noise: float = 1.0,
    lower_order_below: int = 0,
    euler_at_final: bool = False,
) -> list[Row]:
    """Every multistep DPM-Solver: `order` predictions of type `history`, fresh noise eta = tau^2.

    solver_type  second-order weight, a key of `exponential.SECOND`; third  third-order weight, a key of `exponential.THIRD`
    """
    choose("solver_type", solver_type, SECOND), choose("third", third, THIRD)
    steps = len(levels) - 1
    orders = falling_orders(steps, order, lower_order_below, euler_at_final)
    tau = float(eta) ** 0.5
    return exponential_rows(levels, orders, Rule(history, solver_type, third), [tau] * steps, s_noise)


def _rows(order: int, history: str, **fixed):
    def rows(levels: list[Level], process: Process, **options) -> list[Row]:
        return dpm_rows(levels, process, order=order, history=history, **{**fixed, **options})

    return rows


def _third(options: Mapping) -> dict:
    return {"order": 3 if options["third"] == "exact" else 2}


def _sde(options: Mapping) -> dict:
    """The weak order is 2 with fresh noise; what concerns noise holds only while s_noise does not scale it by hand."""
    exact = EXACT if options["s_noise"] == 1.0 else EXACT - {"variance", "noise"}
    return {"exact": exact, "order": 3 if options["eta"] == 0.0 and options.get("third") == "exact" else 2}


_TWO, _THREE = {"solver_type": "midpoint", **_FALLING}, {"solver_type": "midpoint", "third": "compat", **_FALLING}

DPM_2M = Solver("dpm-2m", _rows(2, "noise"), order=2, history="noise", exact=EXACT, options=_TWO)
DPM_3M = Solver("dpm-3m", _rows(3, "noise"), order=2, history="noise", exact=EXACT, options=_THREE, refine=_third)
DPMPP_1 = Solver("dpmpp-1", _rows(1, "data"), order=1, exact=EXACT)
DPMPP_2M = Solver("dpmpp-2m", _rows(2, "data"), order=2, exact=EXACT, options=_TWO)
DPMPP_3M = Solver("dpmpp-3m", _rows(3, "data"), order=2, exact=EXACT, options=_THREE, refine=_third)
SDE_DPMPP_1 = Solver("sde-dpmpp-1", _rows(1, "data", eta=1.0), order=1, exact=EXACT)
SDE_DPMPP_2M = Solver("sde-dpmpp-2m", _rows(2, "data", eta=1.0), order=2, exact=EXACT, options=_TWO)
DPMPP_2M_SDE = Solver(
    "dpmpp-2m-sde",
    _rows(2, "data"),
    order=2,
    exact=EXACT,
    options={"eta": 1.0, "s_noise": 1.0, "solver_type": "midpoint"},
    refine=_sde,
)
DPMPP_3M_SDE = Solver(
    "dpmpp-3m-sde",
    _rows(3, "data", solver_type="heun"),
    order=2,
    exact=EXACT,
    options={"eta": 1.0, "s_noise": 1.0, "third": "compat"},
    refine=_sde,
)
SOLVERS = (
    DPM_2M,
    DPM_3M,
    DPMPP_1,
    DPMPP_2M,
    DPMPP_3M,
    SDE_DPMPP_1,
    SDE_DPMPP_2M,
    DPMPP_2M_SDE,
    DPMPP_3M_SDE,
)
