"""Our solvers against diffusers' schedulers with the same settings, noise and network, over 20 steps."""

import logging

import numpy as np
import pytest
from scheduler_runs import difference, draws_like, run_scheduler, run_table, start

from fastdiff.process import VE, Flow
from fastdiff.solvers.compat import diffusers_setup, process_of

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed; it is what these tables are compared with"
)
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 20
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_V = {"prediction_type": "v_prediction"}
CASES = [
    ("DDIMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": True}, {}),
    ("DDIMScheduler", {"clip_sample": False, **_SD, "steps_offset": 1, "set_alpha_to_one": False, **_V}, {}),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}, {}),
    (
        "DDIMScheduler",
        {"clip_sample": False, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, **_V},
        {},
    ),
    ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}),
    ("DDIMScheduler", {"clip_sample": True, "prediction_type": "sample"}, {"eta": 1.0}),
    ("DDIMParallelScheduler", {"clip_sample": False}, {}),
    ("DDIMInverseScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}),
    (
        "CogVideoXDDIMScheduler",
        {"clip_sample": False, **_V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {},
    ),
    ("DDPMScheduler", {"clip_sample": False}, {}),
    ("DDPMScheduler", {"clip_sample": True, "beta_schedule": "squaredcos_cap_v2"}, {}),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, {}),
    ("DDPMParallelScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
    ("PNDMScheduler", {**_SD, "skip_prk_steps": True, "steps_offset": 1}, {}),
    ("LCMScheduler", {}, {}),
    ("TCDScheduler", {}, {}),
    ("TCDScheduler", {}, {"eta": 0.8}),
    ("EulerDiscreteScheduler", {**_SD}, {}),
    ("EulerDiscreteScheduler", {**_SD, "timestep_spacing": "leading", "steps_offset": 1, **_V}, {}),
    ("EulerDiscreteScheduler", {**_SD, "use_karras_sigmas": True}, {}),
    ("EulerDiscreteScheduler", {**_SD, "use_exponential_sigmas": True, "timestep_spacing": "trailing"}, {}),
    ("EulerDiscreteScheduler", {**_SD, "use_beta_sigmas": True}, {}),
    ("EulerDiscreteScheduler", {**_SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **_V}, {}),
    ("EulerAncestralDiscreteScheduler", {**_SD}, {}),
    ("HeunDiscreteScheduler", {**_SD, "use_karras_sigmas": True}, {}),
    ("HeunDiscreteScheduler", {"clip_sample": True}, {}),
    ("EulerDiscreteScheduler", {**_SD, "clip_sample": True, "skip_prk_steps": True, "trained_betas": None}, {}),
    ("CogVideoXDDIMScheduler", {"clip_sample": True, "prediction_type": "sample"}, {}),
    ("LCMScheduler", {"clip_sample": True, "original_inference_steps": 100}, {}),
    ("KDPM2DiscreteScheduler", {**_SD}, {}),
    ("KDPM2AncestralDiscreteScheduler", {**_SD}, {}),
    ("LMSDiscreteScheduler", {**_SD}, {}),
    ("DPMSolverMultistepScheduler", {**_SD}, {}),
    ("DPMSolverMultistepScheduler", {**_SD, "use_karras_sigmas": True, "solver_type": "heun"}, {}),
    ("DPMSolverMultistepScheduler", {**_SD, "solver_order": 3, "timestep_spacing": "leading", "steps_offset": 1}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "use_exponential_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3, "euler_at_final": True},
        {},
    ),
    ("DPMSolverMultistepScheduler", {**_SD, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", {**_SD, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun", **_V}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, {}),
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {},
    ),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1, "timestep_spacing": "leading"}, {}),
    ("DPMSolverSinglestepScheduler", {**_SD, "solver_order": 2, "lower_order_final": True}, {}),
    ("DPMSolverSinglestepScheduler", {**_SD, "solver_order": 3, "use_karras_sigmas": True}, {}),
    (
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "algorithm_type": "dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"},
        {},
    ),
    ("DEISMultistepScheduler", {**_SD}, {}),
    ("DEISMultistepScheduler", {**_SD, "solver_order": 3, **_V}, {}),
    ("UniPCMultistepScheduler", {**_SD}, {}),
    ("UniPCMultistepScheduler", {**_SD, "solver_order": 3, "use_karras_sigmas": True}, {}),
    ("UniPCMultistepScheduler", {"solver_order": 1, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 2, "solver_type": "bh1", "disable_corrector": [0, 3], "final_sigmas_type": "sigma_min"},
        {},
    ),
    ("UniPCMultistepScheduler", {"predict_x0": False, "solver_order": 2, "final_sigmas_type": "sigma_min"}, {}),
    (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {},
    ),
    ("SASolverScheduler", {**_SD}, {}),
    ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 4, **_V}, {}),
    ("EDMEulerScheduler", {}, {}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_max": 60.0}, {}),
    ("EDMDPMSolverMultistepScheduler", {}, {}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, {}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"mu": 0.9}),
    (
        "FlowMatchEulerDiscreteScheduler",  # as FLUX pipelines call it
        {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
        {"mu": 1.15, "sigmas": "one over n"},
    ),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0, "use_karras_sigmas": True}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
]
# against the schedulers as they are, in float32; DEIS divides differences of nearly equal antiderivatives in float32
STOCK = {"DEISMultistepScheduler": 5e-5}
DECLINED = [
    ("DDIMScheduler", {"thresholding": True}, "thresholding=True"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "learned variance"),
    ("PNDMScheduler", {"skip_prk_steps": False}, "Runge-Kutta"),
    ("TCDScheduler", {"clip_sample": True}, "clip_sample=False"),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}, "no length"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "third-order"),
    ("IPNDMScheduler", {}, "unknown class"),
]


def compare(name, config, call, wide, steps=STEPS):
    """Largest relative difference of the final state and of the model input at any call."""
    if "sigmas" in call:
        call = {**call, "sigmas": [1.0 + (1.0 / steps - 1.0) * i / max(steps - 1, 1) for i in range(steps)]}
    setup = diffusers_setup(name, config, steps, **call)
    table = setup.table()
    calls, z = draws_like(len(table)), start()
    terms = [(r, place, n) for r, row in enumerate(table.rows) for place, n in enumerate(row.noise)]
    got, seen = run_table(table, z * setup.start, {(n.step, n.stream): calls[r, place] for r, place, n in terms})
    options = {
        "step_options": {k: v for k, v in call.items() if k == "eta"},
        "timestep_options": {k: v for k, v in call.items() if k in ("mu", "sigmas")},
    }
    want, inputs = run_scheduler(getattr(diffusers, name).from_config(config), steps, z, calls, wide=wide, **options)
    end = table.end.alpha if config.get("final_sigmas_type") == "sigma_min" and name.startswith("Euler") else 1.0
    return max(difference(got / end, want), *(difference(a, b) for a, b in zip(seen, inputs, strict=True)))


@pytest.mark.parametrize("name, config, call", CASES)
def test_same_numbers_as_diffusers(name, config, call):
    # float64 on both sides; what is left are linspaces in float32 inside some schedulers
    assert compare(name, config, call, wide=True) < 1e-6
    assert compare(name, config, call, wide=False) < STOCK.get(name, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3, 7, 14, 50])
@pytest.mark.parametrize("name, config, call", CASES)
def test_same_numbers_at_any_number_of_steps(name, config, call, steps):
    if name == "SASolverScheduler" and steps < 6:
        with pytest.raises(ValueError, match="noisy step"):
            diffusers_setup(name, config, steps)
        return
    assert compare(name, config, call, wide=True, steps=steps) < 1e-5


@pytest.mark.parametrize("name, config, reason", DECLINED)
def test_settings_that_are_not_ours_are_declined_with_a_reason(name, config, reason):
    with pytest.raises(ValueError, match=reason):
        diffusers_setup(name, config, STEPS)


def test_unknown_call_arguments_are_errors():
    with pytest.raises(ValueError, match="takes no eta"):
        diffusers_setup("UniPCMultistepScheduler", {}, STEPS, eta=0.5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "HeunDiscreteScheduler", "CogVideoXDDIMScheduler"])
def test_process_of_a_config_has_the_schedulers_products(name):
    config = {"_class_name": name, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": name.startswith("Cog")}
    want = getattr(diffusers, name).from_config(config).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(process_of(config).alphas_cumprod, want, rtol=1e-13)


def test_process_of_flow_and_edm_configs():
    assert process_of({"_class_name": "FlowMatchEulerDiscreteScheduler"}) == Flow()
    assert process_of({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}) == Flow()
    assert process_of({"_class_name": "EDMEulerScheduler", "sigma_max": 50.0}) == VE(t_max=50.0)
