"""Fast schedulers against diffusers' own: the same numbers, draws, attributes, files and errors."""

import copy
import inspect
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scheduler_settings import CASES, SD, V

import fastdiff
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.pipeline import fast_class
from fastdiff.solvers.compat.twin import float64_twin

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; these are its schedulers")
logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE, STEPS = (2, 4, 6, 5), 20
MORE = [
    ("IPNDMScheduler", {}, {}),
    ("PNDMScheduler", {"skip_prk_steps": True, **V}, {}),
    ("DEISMultistepScheduler", {"solver_order": 3}, {}),
    ("DPMSolverMultistepInverseScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("DDIMScheduler", {"clip_sample": True}, {"use_clipped_model_output": True, "eta": 0.5}),
    ("EulerDiscreteScheduler", {}, {"s_churn": 5.0}),
    ("EDMEulerScheduler", {}, {"s_churn": 5.0}),
    ("LMSDiscreteScheduler", {**V}, {}),
    ("TCDScheduler", {"clip_sample": True}, {}),
    ("CMStochasticIterativeScheduler", {}, {}),
    ("LTXEulerAncestralRFScheduler", {}, {}),
    ("UnCLIPScheduler", {}, {}),
]
SETTINGS = [case for case in [*CASES, *MORE] if (case[0], *case[1]) != ("EulerDiscreteScheduler", *SD, "clip_sample")]
ONE_PASS = [
    ("DPMSolverMultistepScheduler", SD),
    ("UniPCMultistepScheduler", SD),
    ("EulerDiscreteScheduler", SD),
    ("EulerAncestralDiscreteScheduler", SD),
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("LCMScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("IPNDMScheduler", {}),
    ("SASolverScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


DETERMINISTIC = {
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"),
    *("LMSDiscreteScheduler", "IPNDMScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
}


def make(name, config):
    return getattr(diffusers, name).from_config(config)


def network(x, t):
    """A smooth stand-in for a model; t is a number or [B, 1, 1, 1]."""
    return (torch.tanh(0.7 * x + 0.1) * (0.5 + t / 2000.0) + 0.2 * torch.sin(x + 0.3)).to(x.dtype)


def start(scheduler, shape=SHAPE, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * getattr(scheduler, "init_noise_sigma", 1.0)
    return x.to(dtype)


def run(scheduler, call=None, *, seed=3, steps=STEPS, x=None, each=lambda *a: None):
    """The results of all steps; seed None leaves the noise to torch's global generator."""
    call = dict(call or {})
    times = {name: call.pop(name) for name in ("mu", "sigmas") if name in call}
    if "sigmas" in times:
        times["sigmas"] = [1.0 - 0.95 * i / steps for i in range(steps)]
    scheduler.set_timesteps(*([] if "sigmas" in times else [steps]), **times)
    if "generator" in inspect.signature(scheduler.step).parameters and seed is not None:
        call["generator"] = [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else seed
        if isinstance(seed, int):
            call["generator"] = torch.Generator().manual_seed(seed)
    x, results = start(scheduler) if x is None else x, []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        result = scheduler.step(network(scaled, float(t)), t, x, return_dict=False, **call)
        x = result[0]
        results.append(result)
        each(i, scheduler, call.get("generator"))
    return results


def difference(got, want):
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def worst(got, want, place=slice(None)):
    pairs = [pair for a, b in zip(got, want, strict=True) for pair in zip(a[place], b[place], strict=True)]
    return max(difference(a, b) for a, b in pairs if a is not None)


@pytest.mark.parametrize("name, config, call", SETTINGS)
def test_same_numbers_as_the_scheduler(name, config, call):
    scheduler = make(name, config)
    fast = fastdiff.as_fast(scheduler)
    want, got = run(scheduler, call), run(fast, call)
    # float32 sums in another order, over 20 steps; the first step from zero SNR is a difference of numbers 70 times larger
    assert worst(got, want, slice(1)) < (2e-5 if config.get("rescale_betas_zero_snr") else 3e-6)
    # data predictions at the noisy end divide rounding errors by alpha, 1 / 160 there
    assert worst(got, want) < 1e-4
    assert fast.fastdiff_report().fused == len(want) and not fast.fastdiff_report().stock
    again = run(fast, call)
    assert all(torch.equal(a, b) for x, y in zip(got, again, strict=True) for a, b in zip(x, y, strict=True) if a is not None)


@pytest.mark.parametrize("name, config", [case for case in ONE_PASS if case[0] in DETERMINISTIC])
def test_no_further_from_float64_than_the_scheduler(name, config):
    plain = make(name, config)
    exact = run(float64_twin(plain, None), seed=None, x=start(plain).double())[-1][0]
    errors = [difference(run(s, seed=None)[-1][0], exact) for s in (plain, fastdiff.as_fast(plain))]
    assert errors[1] <= 2 * errors[0] + 1e-6


@pytest.mark.parametrize("name, config", ONE_PASS)
def test_draws_as_the_scheduler(name, config):
    pair = make(name, config), fastdiff.as_fast(make(name, config))
    for seed in (5, [5, 6], None):
        states = []
        for scheduler in pair:
            torch.manual_seed(9)
            given = []
            run(scheduler, seed=seed, each=lambda i, s, g: given.append(g))
            generators = [torch.default_generator] if given[-1] is None else np.ravel(given[-1])
            states.append([torch.default_generator.get_state(), *(g.get_state() for g in generators)])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_variance_noise_is_taken(name):
    noise, config = torch.randn(SHAPE), {"algorithm_type": "sde-dpmsolver++"} if "DPM" in name else {}
    call = {"variance_noise": noise, **({"eta": 0.8} if "DDIM" in name else {})}
    scheduler, kept = make(name, config), noise.clone()
    fast = fastdiff.as_fast(scheduler)
    assert worst(run(fast, call, seed=None), run(scheduler, call, seed=None), slice(1)) < 3e-6
    assert fast.fastdiff_report().fused == STEPS and torch.equal(noise, kept)


@pytest.mark.parametrize("name, config", ONE_PASS)
def test_one_timestep_per_sample_is_each_sample_alone(name, config):
    """Sample b joins b steps late, in place of others that ended."""
    many = fastdiff.as_fast(make(name, config))
    many.set_timesteps(8)
    times, draws = many.timesteps, "generator" in inspect.signature(many.step).parameters
    x0 = start(many, (3, *SHAPE[1:]))
    alone = []
    for b in range(3):
        fast, g = fastdiff.as_fast(make(name, config)), torch.Generator().manual_seed(b)
        fast.set_timesteps(8)
        x, path = x0[b : b + 1], []
        for t in times:
            m = network(fast.scale_model_input(x, t) if hasattr(fast, "scale_model_input") else x, float(t))
            x = fast.step(m, t, x, **({"generator": [g]} if draws else {})).prev_sample
            path.append(x)
        alone.append(path)
    x, generators = x0.clone(), [torch.Generator().manual_seed(b) for b in range(3)]
    for k in range(12):
        places = [(k - 2 * b) % 8 for b in range(3)]
        for b in (b for b, place in enumerate(places) if place == 0):
            x[b] = x0[b]
            generators[b].manual_seed(b)
        t = times[torch.tensor(places)]
        scaled = many.scale_model_input(x, t) if hasattr(many, "scale_model_input") else x
        m = torch.cat([network(scaled[b : b + 1], float(t[b])) for b in range(3)])
        x = many.step(m, t, x, **({"generator": generators} if draws else {})).prev_sample.clone()
        for b, place in enumerate(places):
            if k >= 2 * b:
                assert torch.equal(x[b : b + 1], alone[b][place]), (k, b)
