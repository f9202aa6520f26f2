"""Diffusers' schedulers on training steps (DDIM, DDPM, PNDM, LCM, TCD) as our rows and levels."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from fastdiff.process import Level, Process, VPDiscrete
from fastdiff.solvers.compat import grids
from fastdiff.solvers.consistency import LCM, TCD
from fastdiff.solvers.first_order import DDIM
from fastdiff.solvers.pndm import IPNDM, PLMS
from fastdiff.solvers.row import Row, Solver, choose
from fastdiff.solvers.table import SolverTable, compile_table

_PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "v", "flow_prediction": "flow"}


class Setup(NamedTuple):
    """What runs like a diffusers scheduler.

    States are variance preserving (or rectified flow, or EDM) ones: where the scheduler's own state has alpha = 1, ours is
    alpha times it, which is also the model's input.

    start  deviation of the initial state
    """

    solver: Solver
    process: Process
    levels: list[Level]
    prediction: str
    clamp: tuple[float, float] | None = None
    start: float = 1.0

    def table(self) -> SolverTable:
        """The compiled rows."""
        return compile_table(self.solver, self.levels, self.process, self.prediction, self.clamp)


def prediction_of(config: Mapping) -> str:
    """Our name of the config's prediction type."""
    return choose("prediction_type", config.get("prediction_type", "epsilon"), _PREDICTIONS)


def clamp_of(config: Mapping) -> tuple[float, float] | None:
    """Bounds on the data prediction, where the config clips it."""
    if not config.get("clip_sample"):
        return None
    bound = float(config.get("clip_sample_range", 1.0))
    return -bound, bound


def ancestral_ladder(config: Mapping, steps: int, *, solver: Solver, eta: float = 0.0, jump: bool = True) -> Setup:
    """DDIM and DDPM: integer times; with `jump` a step leads T // n training steps down, wherever the next call is."""
    products = products_of(config)
    T = products.size
    times = np.round(grids.timesteps(config, steps, config["timestep_spacing"], False)).astype(int)
    ends = times - T // steps if jump else np.append(times[1:], -1)
    final = 1.0 if config.get("set_alpha_to_one", True) or not jump else float(products[0])
    at = [grids.vp_level(float(t), float(products[t])) for t in times]
    to = [grids.vp_level(float(max(t, 0)), float(products[t]) if t >= 0 else final) for t in ends]
    if solver.name == "ddpm" and str(config.get("variance_type", "")).startswith("fixed_large"):
        solver = solver.with_options(variance="large")
    if solver.name == "ddim":
        solver = solver.with_options(eta=eta, clip="consistent" if "snr_shift_scale" in config else "reference")
    process, clamp = VPDiscrete(alphas_cumprod=products), None if "snr_shift_scale" in config else clamp_of(config)
    return Setup(_leading_to(solver, to), process, [*at, to[-1]], prediction_of(config), clamp)


def _leading_to(solver: Solver, ends: list[Level]) -> Solver:
    """A one-row solver whose step i ends at ends[i], even where the next call is elsewhere."""

    def rows(levels: list[Level], process: Process, **options) -> list[Row]:
        made = []
        for i, (at, to) in enumerate(zip(levels[:-1], ends, strict=True)):
            (row,) = solver.rows([at, to], process, **options)
            noise = tuple(replace(term, step=i) for term in row.noise)
            made.append(replace(row, B={i: row.B[0]}, noise=noise, step=i))
        return made

    return replace(solver, rows=rows)


def inverse_ladder(config: Mapping, steps: int) -> Setup:
    """DDIM inversion: the state stands T // n below the time that the model is told."""
    products = grids.alphas_cumprod(config)
    times = np.round(grids.timesteps(config, steps, config["timestep_spacing"], False)).astype(int)[::-1]
    below = times - products.size // steps
    first = 1.0 if config.get("set_alpha_to_one", True) else float(products[0])
    if first == 1.0 and below[0] < 0:
        raise ValueError("diffusers_setup: an inversion from zero noise needs set_alpha_to_one=False")
    at = [
        replace(grids.vp_level(float(t), float(products[s]) if s >= 0 else first), time=float(t))
        for t, s in zip(times, below, strict=True)
    ]
    to = [grids.vp_level(float(t), float(products[t])) for t in times]
    solver = _leading_to(DDIM.with_options(clip="reference"), to)
    return Setup(solver, VPDiscrete(alphas_cumprod=products), [*at, to[-1]], prediction_of(config), clamp_of(config))


def products_of(config: Mapping) -> np.ndarray:
    """Cumulative products of a config; CogVideoX shifts their signal-to-noise ratio and rescales afterwards, if at all."""
    if "snr_shift_scale" not in config:
        return grids.alphas_cumprod(config)
    bar = grids.alphas_cumprod({**config, "rescale_betas_zero_snr": False}, dtype=torch.float64)
    scale = float(config["snr_shift_scale"])
    bar = bar / (scale + (1.0 - scale) * bar)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(bar)
        bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return bar


def plms(config: Mapping, steps: int) -> Setup:
    """PNDM without its Runge-Kutta start."""
    if not config["skip_prk_steps"]:
        raise ValueError(
            "diffusers_setup: PNDM with its Runge-Kutta start rounds half steps; compile it with from_scheduler"
        )
    products = grids.alphas_cumprod(config)
    times = np.round(grids.timesteps(config, steps, config["timestep_spacing"], False)).astype(int)
    if np.any(np.diff(times) != -(products.size // steps)):
        raise ValueError(
            "diffusers_setup: PNDM steps T // n down, which these times do not; use timestep_spacing 'leading'"
        )
    if steps < 2:
        raise ValueError("diffusers_setup: PNDM needs at least 2 steps")
    final = 1.0 if config.get("set_alpha_to_one") else float(products[0])
    levels = [grids.vp_level(float(t), float(products[t])) for t in times] + [grids.vp_level(0.0, final)]
    return Setup(PLMS, VPDiscrete(alphas_cumprod=products), levels, prediction_of(config))


def ipndm(config: Mapping, steps: int) -> Setup:
    """IPNDM of a network that predicts v at angles from a quarter turn to 0, sigma = sin(pi s / 2)^2 at s = 1 ... 0."""
    if config.get("trained_betas") is not None:
        raise ValueError("diffusers_setup: IPNDM takes trained_betas as sigmas of its steps; use from_scheduler")
    dtype = torch.float32 if config["precision"] == "stock" else torch.float64
    sigmas = torch.sin(torch.linspace(1, 0, steps + 1).to(dtype) * math.pi / 2) ** 2
    alphas = (1.0 - sigmas**2) ** 0.5
    times = torch.atan2(sigmas, alphas) / math.pi * 2
    levels = [
        Level(0.5 * math.pi * t, alpha, sigma, t)
        for t, alpha, sigma in zip(times.tolist(), alphas.tolist(), sigmas.tolist(), strict=True)
    ]
    # its first state has no signal, and it puts zeros for the data there: no longer exact on constant data
    return Setup(replace(IPNDM, exact=IPNDM.exact - {"data"}), grids.UnitTrigFlow(), levels, "v")


def consistency(config: Mapping, steps: int, *, solver: Solver, eta: float = 0.3) -> Setup:
    """LCM and TCD: every k-th time of the distillation grid."""
    products = grids.alphas_cumprod(config)
    count = int(config["original_inference_steps"])
    origin = (np.arange(1, count + 1) * (products.size // count) - 1)[::-1]
    if steps > count:
        raise ValueError(f"diffusers_setup: at most original_inference_steps={count} steps, got {steps}")
    times = origin[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)]
    levels = [grids.vp_level(float(t), float(products[t])) for t in times]
    if solver is TCD and clamp_of(config):
        raise ValueError("diffusers_setup: TCD with clip_sample=True mixes two estimates; set clip_sample=False")
    if solver is TCD:
        solver, last = TCD.with_options(gamma=eta), grids.vp_level(0.0, float(products[0]))
    else:
        solver = LCM.with_options(boundary=(0.5, float(config["timestep_scaling"])))
        last = grids.vp_level(0.0, 1.0)
    return Setup(solver, VPDiscrete(alphas_cumprod=products), [*levels, last], prediction_of(config), clamp_of(config))
