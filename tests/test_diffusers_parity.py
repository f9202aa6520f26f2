"""Our solvers against diffusers' schedulers with the same settings, noise and network, over 20 steps."""

import logging

import numpy as np
import pytest
import torch
from scheduler_runs import difference, draws_like, run_scheduler, run_table, start
from scheduler_settings import CASES, SD

from fastdiff.process import VE, Flow
from fastdiff.solvers.compat import diffusers_setup, process_of
from fastdiff.solvers.from_scheduler import from_scheduler

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed; it is what these tables are compared with"
)
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 20
DECLINED = [
    ("DDIMScheduler", {"thresholding": True}, "thresholding=True"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "learned variance"),
    ("PNDMScheduler", {"skip_prk_steps": False}, "Runge-Kutta"),
    ("TCDScheduler", {"clip_sample": True}, "clip_sample=False"),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}, "no length"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "third-order"),
    ("IPNDMScheduler", {"trained_betas": [0.9, 0.5, 0.0]}, "use from_scheduler"),
    ("VQDiffusionScheduler", {}, "unknown class"),
]


def compare(name, config, call, wide, steps=STEPS):
    """Largest relative difference of the final state and of the model input at any call."""
    if "sigmas" in call:
        call = {**call, "sigmas": [1.0 + (1.0 / steps - 1.0) * i / max(steps - 1, 1) for i in range(steps)]}
    setup = diffusers_setup(name, config, steps, **call, precision="float64" if wide else "stock")
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
    assert compare(name, config, call, wide=False) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order, config", [(1, {}), (2, SD), (3, {}), (3, SD)])
def test_deis_rounds_as_diffusers_does(order, config, prediction):
    config = {**config, "solver_order": order, "prediction_type": prediction}
    # 50 steps of order 3 with exact weights stand 6e-5 to 3e-4 away, with one bit of float32 wrong in a kappa as much as 1e-4
    assert compare("DEISMultistepScheduler", config, {}, wide=False, steps=50) < 5e-6
    table = from_scheduler(diffusers.DEISMultistepScheduler(**config), 50, precision="stock")
    want, _ = run_scheduler(diffusers.DEISMultistepScheduler(**config), 50, start(), {}, wide=False)
    assert difference(run_table(table, start(), {})[0], want) < 5e-6


def test_exact_weights_of_deis_are_not_the_published_ones():
    config = {"solver_order": 3, "prediction_type": "sample"}
    table = diffusers_setup("DEISMultistepScheduler", config, 50, precision="float64").table()
    want, _ = run_scheduler(diffusers.DEISMultistepScheduler(**config), 50, start(), {}, wide=False)
    assert difference(run_table(table, start(), {})[0], want) > 1e-5


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


def test_process_of_ipndm_tells_the_model_quarter_turns():
    process = process_of({"_class_name": "IPNDMScheduler"})
    assert process.levels([process.t_max])[0].time == 1.0
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(STEPS)
    levels = process.levels(scheduler.timesteps.double().numpy() * np.pi / 2)
    got = [[level.alpha, level.sigma] for level in levels]
    np.testing.assert_allclose(got, torch.stack([scheduler.alphas, scheduler.betas], dim=1)[:-1], atol=2e-6)
