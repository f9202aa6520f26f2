"""Scheduler settings of diffusers as our solver, process and noise levels: class name and config in, no diffusers needed."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fastdiff.process import Flow, Process, VPDiscrete
from fastdiff.solvers.compat import grids
from fastdiff.solvers.compat import sigmas as sigma_based
from fastdiff.solvers.compat import steps as step_based
from fastdiff.solvers.compat.deis import deis
from fastdiff.solvers.compat.steps import Setup
from fastdiff.solvers.consistency import LCM, TCD
from fastdiff.solvers.deis import LMS
from fastdiff.solvers.first_order import DDIM, DDPM, EULER, EULER_ANCESTRAL, FLOW_EULER
from fastdiff.solvers.heun import DPM2, DPM2_A, FLOW_HEUN, HEUN
from fastdiff.solvers.row import choose


def diffusers_setup(
    class_name: str,
    config: Mapping[str, object],
    steps: int,
    *,
    eta: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
    precision: str = "stock",
) -> Setup:
    """Our solver, process, levels and prediction type for a diffusers scheduler class and its config.

    config  as in scheduler_config.json; absent entries have diffusers' defaults for that class
    eta     the argument of the same name of `step` (DDIM, TCD); mu, sigmas  those of `set_timesteps` (FlowMatch)
    precision  "stock": as the class computes, in float32 where that loses digits (DEIS's weights, IPNDM's levels); "float64":
               as its formulas mean it

    Raises ValueError, with the reason, for classes and settings that are not affine or not known.
    """
    if class_name not in _CLASSES:
        raise ValueError(f"diffusers_setup: unknown class {class_name!r}; known are {', '.join(_CLASSES)}")
    build, defaults = _CLASSES[class_name]
    choose("precision", precision, ("stock", "float64"))
    config = {**defaults, **config, "precision": precision}
    for name in ("thresholding", "invert_sigmas", "use_lu_lambdas"):
        if config.get(name):
            raise ValueError(
                f"diffusers_setup: {class_name} with {name}=True is not supported; use the scheduler itself"
            )
    if str(config.get("variance_type", "")).startswith("learned"):
        raise ValueError(f"diffusers_setup: {class_name} with a learned variance needs a second model output")
    call = {name: value for name, value in (("eta", eta), ("mu", mu), ("sigmas", sigmas)) if value is not None}
    for name in call:
        if name not in inspect.signature(build).parameters:
            raise ValueError(f"diffusers_setup: {class_name} takes no {name}; leave it out")
    return build(config, steps, **call)


def process_of(config: Mapping[str, object]) -> Process:
    """The noise process that a scheduler config trains or samples: its `_class_name` and its betas."""
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name == "IPNDMScheduler":
        return grids.UnitTrigFlow()
    config = {**(_CLASSES[name][1] if name in _CLASSES else {}), **config}
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return Flow(time_scale=float(config.get("num_train_timesteps", 1000)))
    if name.startswith("EDM"):
        return sigma_based.edm_process(config)
    return VPDiscrete(alphas_cumprod=step_based.products_of(config))


_LADDER = {"timestep_spacing": "leading"}
_STEP = {**_LADDER, "clip_sample": True, "set_alpha_to_one": True}
_K = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}
_DPM = {
    **{"timestep_spacing": "linspace", "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    **{"lower_order_final": True, "euler_at_final": False, "final_sigmas_type": "zero"},
}
_SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_K_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_LCM = {**_SCALED, "original_inference_steps": 50, "timestep_scaling": 10.0, "clip_sample": False}
_EDM = {"sigma_schedule": "karras", "rho": 7.0, "prediction_type": "epsilon", "final_sigmas_type": "zero"}
_FLOW = {"num_train_timesteps": 1000, "shift": 1.0, "time_shift_type": "exponential"}
_ROUNDS = {"always_round": True}  # not a setting of diffusers but what the class does, as fixed_spacing and from_one
_COGVIDEO = {**_STEP, **_SCALED, "snr_shift_scale": 3.0}
_ddim, _ddpm = (
    partial(step_based.ancestral_ladder, solver=DDIM),
    partial(step_based.ancestral_ladder, solver=DDPM, jump=False),
)

# class name -> (how, diffusers' defaults of that class as far as they matter)
_CLASSES: dict[str, tuple[Callable[..., Setup], Mapping]] = {
    "DDIMScheduler": (_ddim, _STEP),
    "DDIMParallelScheduler": (_ddim, _STEP),
    "CogVideoXDDIMScheduler": (_ddim, _COGVIDEO),
    "DDIMInverseScheduler": (step_based.inverse_ladder, _STEP),
    "DDPMScheduler": (_ddpm, _STEP),
    "DDPMParallelScheduler": (_ddpm, _STEP),
    "IPNDMScheduler": (step_based.ipndm, {}),
    "PNDMScheduler": (step_based.plms, {**_LADDER, "skip_prk_steps": False, "set_alpha_to_one": False}),
    "LCMScheduler": (partial(step_based.consistency, solver=LCM), _LCM),
    "TCDScheduler": (partial(step_based.consistency, solver=TCD), _LCM),
    "EulerDiscreteScheduler": (partial(sigma_based.sigma_ladder, solver=EULER), _K),
    "EulerAncestralDiscreteScheduler": (partial(sigma_based.sigma_ladder, solver=EULER_ANCESTRAL), _K),
    "HeunDiscreteScheduler": (partial(sigma_based.sigma_ladder, solver=HEUN, clips=True), {**_K, **_K_BETAS}),
    "KDPM2DiscreteScheduler": (partial(sigma_based.sigma_ladder, solver=DPM2, rounded=True), {**_K, **_K_BETAS}),
    "KDPM2AncestralDiscreteScheduler": (
        partial(sigma_based.sigma_ladder, solver=DPM2_A, rounded=True),
        {**_K, **_K_BETAS},
    ),
    "LMSDiscreteScheduler": (partial(sigma_based.sigma_ladder, solver=LMS), _K),
    "DPMSolverMultistepScheduler": (partial(sigma_based.exponential_ladder, solver=sigma_based.dpm), _DPM),
    "DPMSolverSinglestepScheduler": (
        partial(sigma_based.exponential_ladder, solver=sigma_based.single),
        {**_DPM, **_ROUNDS, "lower_order_final": False, "fixed_spacing": "linspace"},
    ),
    "DEISMultistepScheduler": (
        partial(sigma_based.exponential_ladder, solver=deis, last="repeat"),
        {**_DPM, **_ROUNDS},
    ),
    "UniPCMultistepScheduler": (
        partial(sigma_based.exponential_ladder, solver=sigma_based.unipc),
        {**_DPM, **_ROUNDS, "solver_type": "bh2", "predict_x0": True, "disable_corrector": (), "from_one": True},
    ),
    "SASolverScheduler": (
        partial(sigma_based.exponential_ladder, solver=sigma_based.sa, last="repeat"),
        {**_DPM, "predictor_order": 2, "corrector_order": 2, "algorithm_type": "data_prediction"},
    ),
    "EDMEulerScheduler": (partial(sigma_based.edm, solver=EULER), _EDM),
    "EDMDPMSolverMultistepScheduler": (partial(sigma_based.edm, solver=sigma_based.dpm), {**_DPM, **_EDM}),
    "FlowMatchEulerDiscreteScheduler": (partial(sigma_based.flow, solver=FLOW_EULER), _FLOW),
    "FlowMatchHeunDiscreteScheduler": (partial(sigma_based.flow, solver=FLOW_HEUN), _FLOW),
}
