"""Diffusers' schedulers on sigmas (k-diffusion's, DPM-Solver's, EDM's and rectified flow's) as our rows and levels."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from fastdiff.process import VE, Flow, VPDiscrete
from fastdiff.solvers.compat import grids
from fastdiff.solvers.compat.steps import Setup, clamp_of, prediction_of
from fastdiff.solvers.consistency import LCM
from fastdiff.solvers.multistep import dpm_rows
from fastdiff.solvers.row import Solver, choose
from fastdiff.solvers.sa import SA
from fastdiff.solvers.singlestep import DPM_FAST
from fastdiff.solvers.unipc import UNIPC


def sigma_ladder(config: Mapping, steps: int, *, solver: Solver, rounded: bool = False, clips: bool = False) -> Setup:
    """The k-diffusion family: unrounded times, kappa linear between training steps, zero noise at the end.

    rounded  Karras times are whole training steps; clips  the class obeys clip_sample
    """
    process = grids.LogSigmaVP(alphas_cumprod=grids.alphas_cumprod(config, zero_snr_floor=True))
    table = np.exp(process._log_kappa())
    times = grids.timesteps(config, steps, config["timestep_spacing"], False)
    kappas = np.interp(times, np.arange(table.size), table)
    if config.get("interpolation_type", "linear") != "linear":
        raise ValueError("diffusers_setup: interpolation_type must be 'linear'; compile others with from_scheduler")
    spaced = grids.spaced_kappas(config, kappas, steps)
    if spaced is not None:
        kappas, times = spaced, grids.log_interpolated_times(spaced, process)
        times = np.round(times) if rounded and config.get("use_karras_sigmas") else times
    last = table[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    levels = grids.kappa_levels(kappas, times, float(last))
    start = levels[0].sigma if config["timestep_spacing"] in ("linspace", "trailing") else 1.0
    return Setup(solver, process, levels, prediction_of(config), clamp_of(config) if clips else None, start)


def exponential_ladder(
    config: Mapping, steps: int, *, solver: Callable[[Mapping, np.ndarray], Solver], last: str = ""
) -> Setup:
    """The DPM-Solver family: integer times of n + 1 points without the last, or sigmas, or rectified flow."""
    last = last or config.get("final_sigmas_type", "zero")
    if config.get("use_flow_sigmas"):
        return _flow_exponential(config, steps, solver=solver, last=last)
    floor = bool(config.get("rescale_betas_zero_snr"))
    process = VPDiscrete(alphas_cumprod=grids.alphas_cumprod(config, zero_snr_floor=floor))
    lam = process.lam(np.arange(process.alphas_cumprod.size))
    table, T = np.exp(-lam), lam.size
    clipped = int(np.searchsorted(lam[::-1], config.get("lambda_min_clipped", -np.inf)))
    spacing = config.get("fixed_spacing", config["timestep_spacing"])
    if clipped and spacing != "linspace":
        raise ValueError("diffusers_setup: lambda_min_clipped needs timestep_spacing 'linspace'")
    times = grids.timesteps({**config, "num_train_timesteps": T - clipped}, steps, spacing, True)
    times = np.round(times)
    kappas, spaced = np.interp(times, np.arange(T), table), grids.spaced_kappas(config, table[::-1], steps)
    if spaced is not None:
        times = grids.log_interpolated_times(spaced, process)
        rounds = config.get("use_karras_sigmas") and (
            config.get("always_round") or config.get("beta_schedule") != "squaredcos_cap_v2"
        )
        kappas, times = spaced, np.floor(np.round(times) if rounds else times)
    if last == "repeat" and spaced is not None:
        raise ValueError("diffusers_setup: this class repeats its last sigma, a step of no length; use its own times")
    end = 0.0 if last == "zero" else float(kappas[-1] if last == "last" and spaced is not None else table[0])
    levels = grids.kappa_levels(kappas, times, end)
    return Setup(solver(config, times), process, levels, prediction_of(config))


def _flow_exponential(
    config: Mapping, steps: int, *, solver: Callable[[Mapping, np.ndarray], Solver], last: str
) -> Setup:
    if last != "zero":
        raise ValueError("diffusers_setup: flow sigmas need final_sigmas_type 'zero'")
    T, shift = int(config.get("num_train_timesteps", 1000)), float(config.get("flow_shift", 1.0))
    if config.get("use_dynamic_shifting") or config.get("shift_terminal"):
        raise ValueError("diffusers_setup: dynamic and terminal shifts of this class are not supported")
    if config.get("from_one"):
        sigmas = grids.shifted(np.linspace(1.0, 1.0 / T, steps + 1)[:-1], shift)
        sigmas[0] -= 1e-6 if abs(sigmas[0] - 1.0) < 1e-6 else 0.0
    else:
        sigmas = grids.shifted(1.0 - np.linspace(1.0, 1.0 / T, steps + 1), shift)[::-1][:-1]
    times = np.floor(sigmas * T)
    levels = grids.flow_levels(sigmas, times)
    return Setup(solver(config, times), Flow(time_scale=float(T)), levels, prediction_of(config))


def dpm(config: Mapping, times: np.ndarray) -> Solver:
    kind, order = config["algorithm_type"], int(config["solver_order"])
    choose("algorithm_type", kind, ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"))
    if kind.startswith("sde") and order == 3:
        raise ValueError(
            "diffusers_setup: the third-order SDE row of diffusers has a wrong sign (its weight of the second difference "
            "tends to -alpha instead of 0); use dpmpp-3m-sde, order 2, or from_scheduler"
        )
    options = {
        "order": choose("solver_order", order, (1, 2, 3)),
        "history": "data" if kind.endswith("++") else "noise",
        "solver_type": config["solver_type"],
        "eta": 1.0 if kind.startswith("sde") else 0.0,
        "lower_order_below": 15 if config["lower_order_final"] else 0,
        "euler_at_final": bool(config["euler_at_final"]),
    }
    return Solver(kind, partial(dpm_rows, **options), order=order, history=options["history"])


def unipc(config: Mapping, times: np.ndarray) -> Solver:
    return UNIPC.with_options(
        order=int(config["solver_order"]),
        solver_type=config["solver_type"],
        history="data" if config["predict_x0"] else "noise",
        lower_order_final=bool(config["lower_order_final"]),
        disable_corrector=tuple(config["disable_corrector"]),
    )


_SA_NOISY = (200.0, 800.0)  # training steps with noise, unless the scheduler is given another tau_func


def sa(config: Mapping, times: np.ndarray) -> Solver:
    if times[-1] >= _SA_NOISY[0]:
        raise ValueError(f"diffusers_setup: SASolver ends with a noisy step in {len(times)} steps; take more")
    return SA.with_options(
        order=int(config["predictor_order"]),
        corrector_order=int(config["corrector_order"]),
        interval=_SA_NOISY,
        history="data" if config["algorithm_type"] == "data_prediction" else "noise",
        rescale=True,
        lower_order_final=bool(config["lower_order_final"]),
    )


def single(config: Mapping, times: np.ndarray) -> Solver:
    kind, order, steps = config["algorithm_type"], int(config["solver_order"]), len(times)
    if kind.startswith("sde"):
        raise ValueError("diffusers_setup: the single-step SDE is not supported; compile it with from_scheduler")
    lower = config["lower_order_final"] or steps % order != 0 or config["final_sigmas_type"] == "zero"
    plan = [order] * (steps // order) + [steps % order] * (steps % order > 0)
    if lower and steps % order == 0 and order > 1:
        plan = plan[:-1] + ([2, 1] if order == 3 else [1, 1])
    if config["final_sigmas_type"] == "zero" and plan[-1] > 1:
        plan = [*plan[:-1], plan[-1] - 1, 1]
    options = {"order": order, "solver_type": config["solver_type"], "inner": "same", "plan": tuple(plan)}
    return DPM_FAST.with_options(history="data" if kind.endswith("++") else "noise", **options)


def edm_process(config: Mapping) -> VE:
    high, low = float(config.get("sigma_max", 80.0)), float(config.get("sigma_min", 0.002))
    return VE(t_max=high, t_min=low, sigma_data=float(config.get("sigma_data", 0.5)))


def edm(config: Mapping, steps: int, *, solver: Solver | Callable[[Mapping, np.ndarray], Solver]) -> Setup:
    if config["prediction_type"] != "epsilon":
        raise ValueError("diffusers_setup: EDM schedulers are supported with prediction_type 'epsilon' only")
    process, ramp = edm_process(config), np.linspace(0.0, 1.0, steps)
    low, high = process.t_min, process.t_max
    choose("sigma_schedule", config["sigma_schedule"], ("karras", "exponential"))
    if config["sigma_schedule"] == "karras":
        sigmas = grids.karras(low, high, ramp, float(config["rho"]))
    else:
        sigmas = np.exp(np.linspace(np.log(low), np.log(high), steps))[::-1]
    if config["final_sigmas_type"] != "zero":
        raise ValueError("diffusers_setup: EDM schedulers repeat sigma_min at the end; use final_sigmas_type 'zero'")
    levels = [*process.levels(sigmas), process.zero_noise()]
    solver = solver if isinstance(solver, Solver) else solver(config, sigmas)
    return Setup(solver, process, levels, "edm", start=float(np.hypot(high, 1.0)))


def flow(
    config: Mapping, steps: int, *, solver: Solver, mu: float | None = None, sigmas: Sequence[float] | None = None
) -> Setup:
    T, shift = int(config["num_train_timesteps"]), float(config["shift"])
    low, dynamic = 1.0 / T, bool(config.get("use_dynamic_shifting"))
    if dynamic and (mu is None or config["time_shift_type"] != "exponential"):
        raise ValueError("diffusers_setup: dynamic shifting needs mu and time_shift_type 'exponential'")
    # the static shift acts on the ends of the grid and then again on the grid
    if sigmas is None:
        sigmas = np.linspace(1.0, low if dynamic else float(grids.shifted(np.array(low), shift)), steps)
    elif len(sigmas) != steps:
        raise ValueError(f"diffusers_setup: sigmas must have one entry per step, {steps}, got {len(sigmas)}")
    sigmas = grids.shifted(np.asarray(sigmas, dtype=np.float64), float(np.exp(mu)) if dynamic else shift)
    if config.get("shift_terminal"):
        sigmas = 1.0 - (1.0 - sigmas) * (1.0 - float(config["shift_terminal"])) / (1.0 - sigmas[-1])
    spaced = grids.spaced_kappas(config, sigmas, steps)
    sigmas = sigmas if spaced is None else spaced
    if config.get("stochastic_sampling"):
        solver = LCM
    return Setup(solver, Flow(time_scale=float(T)), grids.flow_levels(sigmas, sigmas * T), "flow")
