"""Schedulers compiled by probing: the same numbers as the scheduler itself, and a reason where that is impossible."""

import copy
import logging

import numpy as np
import pytest
import torch
from scheduler_runs import difference, draws_like, network, run_scheduler, run_table, start

from fastdiff.ops import solver_step
from fastdiff.process import VPDiscrete
from fastdiff.sampler import Sampler
from fastdiff.solvers.from_scheduler import from_scheduler

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed; it is what these tables are compared with"
)
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

COMPILED = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {"clip_sample": False}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    ("SASolverScheduler", {}),
    ("IPNDMScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("DDIMInverseScheduler", {"clip_sample": False}),
    ("CogVideoXDDIMScheduler", {"clip_sample": False}),
    ("DPMSolverMultistepInverseScheduler", {}),
]
DECLINED = [
    ("DDIMScheduler", {"clip_sample": True}, "not affine"),
    ("DPMSolverMultistepScheduler", {"thresholding": True}, "not affine"),
    ("RePaintScheduler", {}, "missing"),
]


@pytest.mark.parametrize("name, config", COMPILED)
def test_compiled_scheduler_gives_the_schedulers_numbers(name, config):
    scheduler = getattr(diffusers, name)(**config)
    table = from_scheduler(scheduler, 20)
    draws = draws_like(len(table))
    x = start()
    got, seen = run_table(table, x * table.start.sigma, {(call, 1 + place): z for (call, place), z in draws.items()})
    want, inputs = run_scheduler(scheduler, 20, x, draws)
    assert difference(got, want) < 1e-11
    assert max(difference(a, b) for a, b in zip(seen, inputs, strict=True)) < 1e-11
    stock, _ = run_scheduler(scheduler, 20, x, draws, wide=False)
    assert difference(got, stock) < 1e-5  # the scheduler's own float32


@pytest.mark.parametrize("name, config, reason", DECLINED)
def test_schedulers_that_are_not_affine_are_declined_with_a_reason(name, config, reason):
    with pytest.raises(ValueError, match=f"{name} cannot be compiled.*{reason}"):
        from_scheduler(getattr(diffusers, name)(**config), 10)


def test_the_given_scheduler_its_class_and_its_module_stay_as_they_were():
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    before, methods, names = copy.deepcopy(vars(scheduler)), dict(vars(type(scheduler))), dict(vars(module))
    from_scheduler(scheduler, 7)
    assert vars(scheduler).keys() == before.keys() and scheduler.sigmas.equal(before["sigmas"])
    assert dict(vars(type(scheduler))) == methods and all(vars(module)[k] is v for k, v in names.items())


def test_step_and_timestep_options_are_passed_on():
    ddim = diffusers.DDIMScheduler(clip_sample=False)
    table = from_scheduler(ddim, 12, step_options={"eta": 1.0})
    draws, x = draws_like(12), start()
    noise = {(call, 1 + place): z for (call, place), z in draws.items()}
    want, _ = run_scheduler(ddim, 12, x, draws, step_options={"eta": 1.0})
    assert difference(run_table(table, x, noise)[0], want) < 1e-12
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    table = from_scheduler(flow, timestep_options={"sigmas": [1.0, 0.6, 0.3]})
    assert len(table) == 3 and np.allclose(table.time, [1000.0, 600.0, 300.0])


def test_a_compiled_table_is_a_solver_of_the_sampler():
    """Two samples at different seeds; the deterministic UniPC table gives what the scheduler gives from the same start."""
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=3)
    table = from_scheduler(scheduler, 12)
    net = lambda x, t: torch.stack(
        [torch.from_numpy(network(row.numpy(), when)) for row, when in zip(x, t, strict=True)]
    )
    sampler = Sampler(net, prediction="noise", process=VPDiscrete(), model_dtype=torch.float64)
    x = torch.from_numpy(np.stack([start(), -start()]))
    got = sampler.sample(x=x, solver=table, seed=[1, 2], dtype=torch.float64)
    for b, sign in enumerate((1.0, -1.0)):
        want, _ = run_scheduler(scheduler, 12, sign * start(), {})
        assert difference(got[b].numpy(), want) < 1e-12


def test_a_compiled_table_runs_in_the_step_kernel():
    """UniPC's two-state predictor-corrector, as one-state rows, through ops.solver_step in float64."""
    table = from_scheduler(diffusers.UniPCMultistepScheduler(solver_order=3), 12)
    x = torch.from_numpy(start())[None].clone()
    history, tick = torch.full((table.slots, *x.shape), torch.nan, dtype=x.dtype), torch.zeros(1, dtype=torch.int32)
    coef, meta = torch.from_numpy(table.coef), torch.from_numpy(table.meta)
    rows = torch.arange(len(table), dtype=torch.int32)[:, None].contiguous()
    want, inputs = run_table(table, start(), {})
    for r in range(len(table)):
        m = torch.from_numpy(network(table.c_in[r] * x[0].numpy(), table.time[r]))[None]
        solver_step(
            x,
            history,
            x.new_empty(0, *x.shape),
            tick,
            [m],
            None,
            None,
            coef,
            meta,
            rows,
            torch.zeros(1, dtype=torch.int64),
        )
    assert difference(x[0].numpy(), want) < 1e-13
