"""Parity certificates: our solvers and diffusers' schedulers with the same settings, network and noise, side by side."""

import importlib
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from fastdiff.ops.solver_step import COEF, solver_step
from fastdiff.solvers.compat.setup import diffusers_setup
from fastdiff.solvers.compat.twin import float64_twin
from fastdiff.solvers.row import Solver
from fastdiff.solvers.table import SolverTable
from fastdiff.solvers.verify import Certificate

_STEPS, _SIZE, _BOUND = 20, 64, 1e-5
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_PLAIN, _NOISE = {"clip_sample": False}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_MULTISTEP, _FLOW = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"

# our solver -> the scheduler with the same settings
PEERS: dict[str, tuple[tuple[str, Mapping[str, object]], ...]] = {
    "ddim": (("DDIMScheduler", _PLAIN),),
    "ddpm": (("DDPMScheduler", _PLAIN),),
    "euler": (("EulerDiscreteScheduler", _SD), ("EDMEulerScheduler", {})),
    "euler-a": (("EulerAncestralDiscreteScheduler", _SD),),
    "heun": (("HeunDiscreteScheduler", {"use_karras_sigmas": True}),),
    "dpm2": (("KDPM2DiscreteScheduler", {}),),
    "dpm2-a": (("KDPM2AncestralDiscreteScheduler", {}),),
    "lms": (("LMSDiscreteScheduler", _SD),),
    "ipndm": (("IPNDMScheduler", {}),),
    "plms": (("PNDMScheduler", {**_SD, "skip_prk_steps": True, "steps_offset": 1}),),
    "dpm-2m": ((_MULTISTEP, _NOISE),),
    "dpm-3m": ((_MULTISTEP, {**_NOISE, "solver_order": 3}),),
    "dpmpp-1": ((_MULTISTEP, {**_SD, "solver_order": 1}),),
    "dpmpp-2m": ((_MULTISTEP, _SD), (_MULTISTEP, {**_SD, "use_karras_sigmas": True})),
    "dpmpp-3m": ((_MULTISTEP, {**_SD, "solver_order": 3}),),
    "sde-dpmpp-1": ((_MULTISTEP, {**_SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 1}),),
    "sde-dpmpp-2m": ((_MULTISTEP, {**_SD, "algorithm_type": "sde-dpmsolver++"}),),
    "dpm-fast": (("DPMSolverSinglestepScheduler", {**_SD, "solver_order": 3}),),
    "deis": (("DEISMultistepScheduler", _SD), ("DEISMultistepScheduler", {**_SD, "solver_order": 3})),
    "unipc": (("UniPCMultistepScheduler", _SD), ("UniPCMultistepScheduler", {**_SD, "solver_order": 3})),
    "sa": (("SASolverScheduler", _SD),),
    "flow-euler": ((_FLOW, {"shift": 3.0}),),
    "flow-heun": (("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),),
    "lcm": (("LCMScheduler", {}),),
    "tcd": (("TCDScheduler", {}),),
}


def certify_parity(solver: Solver) -> list[Certificate]:
    """One certificate per scheduler that this solver corresponds to; none where diffusers has no such scheduler."""
    if solver.name not in PEERS:
        return []
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise RuntimeError(
            "verify: diffusers is not installed; install it or verify against exact solutions"
        ) from error
    records = []
    for name, config in PEERS[solver.name]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = getattr(diffusers, name)(**config)
            exact, stock = (scheduler_difference(scheduler, name, config, p) for p in ("float64", "stock"))
        passed = exact <= _BOUND and stock <= _BOUND
        message = "" if passed else f"differs from {name} over {_STEPS} steps; see fastdiff.solvers.compat"
        settings = ", ".join(f"{key}={value}" for key, value in config.items() if key not in _SD)
        records.append(
            Certificate(solver.name, f"{name}({settings})", passed, message, difference=exact, stock_difference=stock)
        )
    return records


def scheduler_difference(
    scheduler: object, name: str, config: Mapping[str, object], precision: str, steps: int = _STEPS
) -> float:
    """Largest relative difference of the final states: our rows through ops.solver_step against the scheduler.

    precision  of the scheduler: "stock" as it is, in float32; "float64" the same methods in float64
    """
    setup = diffusers_setup(name, config, steps, precision=precision)
    table = setup.table()
    random = np.random.default_rng(0)
    z, draws = random.standard_normal(_SIZE), random.standard_normal((len(table), 2, _SIZE))
    got = _run_table(table, z * setup.start, draws)
    want = _run_scheduler(scheduler, steps, z, draws, torch.float64 if precision == "float64" else torch.float32)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def _network(x: np.ndarray, t: float) -> np.ndarray:
    """A smooth nonlinear function of state and time: any error in either shows."""
    return np.tanh(0.7 * x + 0.1) * (0.5 + t / 2000.0) + 0.2 * np.sin(x + 0.3)


def _run_table(table: SolverTable, x: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The table's rows in float64, with the noise of call r from draws[r]."""
    state = torch.from_numpy(x)[None].clone()
    coef, meta = torch.from_numpy(table.coef.copy()), torch.from_numpy(table.meta)
    coef[:, [COEF.index("C0"), COEF.index("C1")]] = 0.0
    history, none = torch.zeros(table.slots, *state.shape, dtype=torch.float64), state.new_empty(0, *state.shape)
    rows = torch.arange(len(table), dtype=torch.int32)[:, None].contiguous()
    tick, seed = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    noise = {
        (n.step, n.stream): draws[r, place] for r, row in enumerate(table.rows) for place, n in enumerate(row.noise)
    }
    for r, row in enumerate(table.rows):
        m = torch.from_numpy(_network(table.c_in[r] * state[0].numpy(), table.time[r]))[None]
        solver_step(state, history, none, tick, [m], None, None, coef, meta, rows, seed)
        for term in row.noise:
            state[0] += term.scale * torch.from_numpy(noise[term.step, term.stream])
    return state[0].numpy()


def _run_scheduler(scheduler: object, steps: int, z: np.ndarray, draws: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    call, place = 0, 0

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal place
        place += 1
        return torch.from_numpy(draws[call, place - 1]).reshape(shape).to(dtype)

    twin = float64_twin(scheduler, draw, wide=dtype == torch.float64)
    twin.set_timesteps(steps)
    x = torch.from_numpy(z * float(getattr(twin, "init_noise_sigma", 1.0))).reshape(1, 1, 1, -1).to(dtype)
    for call, t in enumerate(twin.timesteps):  # noqa: B007 (read by draw)
        place = 0
        scaled = twin.scale_model_input(x, t) if hasattr(twin, "scale_model_input") else x
        m = torch.from_numpy(_network(scaled.double().numpy(), float(t))).to(dtype)
        x = twin.step(m, t, x).prev_sample
    return x.double().numpy().ravel()
