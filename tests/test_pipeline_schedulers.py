"""Fast schedulers against diffusers' own: the same numbers, draws, attributes, files and errors."""

import inspect
import logging

import numpy as np
import pytest
import torch
from scheduler_settings import CASES, SD, V

import fastdiff
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.solvers.compat.twin import float64_twin

pytest.importorskip("diffusers", reason="diffusers is not installed; these are its schedulers")
from scheduler_pairs import SHAPE, STEPS, difference, make, network, run, start, worst

logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

MORE = [
    ("IPNDMScheduler", {}, {}),
    ("DDIMInverseScheduler", {}, {}),
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


@pytest.mark.parametrize("name, config, call", SETTINGS)
def test_same_numbers_as_the_scheduler(name, config, call):
    scheduler = make(name, config)
    fast = fastdiff.as_fast(scheduler)
    want, got = run(scheduler, call), run(fast, call)
    # float32 sums in another order, over 20 steps; the first step from zero SNR is a difference of numbers 70 times larger
    limit = 2e-5 if config.get("rescale_betas_zero_snr") else 3e-6
    if config.get("solver_order") == 3 and name.startswith("DEIS") and config.get("prediction_type") == "sample":
        # the scheduler's antiderivatives lose digits in float32: it is further from float64 than from us
        exact = run(float64_twin(make(name, config), None), seed=None, x=start(scheduler).double())
        limit = worst(want, exact, slice(1))
    assert worst(got, want, slice(1)) < limit
    # data predictions at the noisy end divide rounding errors by alpha, 1 / 160 there
    assert worst(got, want) < 1e-4
    assert fast.fastdiff_report().fused == len(want) and not fast.fastdiff_report().stock
    again = run(fast, call)
    assert all(
        torch.equal(a, b) for x, y in zip(got, again, strict=True) for a, b in zip(x, y, strict=True) if a is not None
    )


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
            given = run(scheduler, seed=seed, give_generator=True)
            states.append([torch.default_generator.get_state(), *(g.get_state() for g in np.ravel(given) if g)])
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


@pytest.mark.parametrize("name, config", [case for case in ONE_PASS if case[0] not in DETERMINISTIC])
def test_philox_noise_is_the_samples_own(name, config):
    call = {"eta": 1.0} if name == "DDIMScheduler" else {}
    together = fastdiff.as_fast(make(name, config), noise="philox", seed=[11, 12])
    before = torch.default_generator.get_state()
    got = run(together, call, seed=None)[-1][0]
    assert torch.equal(torch.default_generator.get_state(), before)
    for b in range(2):
        single = fastdiff.as_fast(make(name, config), noise="philox", seed=11 + b)
        assert torch.equal(run(single, call, seed=None, x=start(single)[b : b + 1])[-1][0], got[b : b + 1])
    seeds = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    other = fastdiff.as_fast(make(name, config), noise="philox", seed=99)
    assert torch.equal(run(other, {**call, "generator": seeds}, seed=None)[-1][0], got)


def test_philox_noise_does_not_repeat_after_an_interruption():
    whole, parted = (fastdiff.as_fast(make("DDIMScheduler", {}), noise="philox", seed=4) for _ in range(2))
    want = run(whole, {"eta": 1.0}, seed=None)
    parted.set_timesteps(STEPS)
    x = start(parted)
    for i, t in enumerate(parted.timesteps):
        if i == 7:
            parted.alphas_cumprod = parted.alphas_cumprod.clone()
        x = parted.step(network(x, float(t)), t, x, eta=1.0).prev_sample
    assert torch.equal(x, want[-1][0])


def test_philox_noise_is_that_of_the_sampler():
    fast = fastdiff.as_fast(make("EulerAncestralDiscreteScheduler", SD), noise="philox", seed=21)
    plain = make("EulerAncestralDiscreteScheduler", SD)
    for scheduler in (fast, plain):
        scheduler.set_timesteps(STEPS)
        scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])
    x, m = torch.randn(SHAPE), torch.randn(SHAPE)
    for step, t in enumerate(plain.timesteps):
        seed, one = torch.tensor([21, 22]), torch.ones(2, dtype=torch.int32)
        z = philox_normal(seed, one * step, one, x[0].numel()).reshape(SHAPE)
        up = (plain.sigmas[step + 1] ** 2 * (1 - plain.sigmas[step + 1] ** 2 / plain.sigmas[step] ** 2)) ** 0.5
        got, mean = fast.step(m, t, x).prev_sample, plain.step(m, t, x, generator=torch.Generator().manual_seed(0))
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        assert difference(got, mean.prev_sample + (z - drawn) * up) < 2e-6


@pytest.mark.parametrize("name, config", ONE_PASS)
@pytest.mark.parametrize("output, sample", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_half_precision(name, config, output, sample):
    plain = make(name, config)
    fast, results = fastdiff.as_fast(plain), []
    exact = run(plain)[0][0]
    for scheduler in (plain, fast):
        scheduler.set_timesteps(STEPS)
        x, t = start(scheduler).to(sample), scheduler.timesteps[0]
        m = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, float(t))
        draws = "generator" in inspect.signature(scheduler.step).parameters
        results.append(
            scheduler.step(m.to(output), t, x, **({"generator": torch.Generator().manual_seed(3)} if draws else {}))
        )
    want, got = results[0].prev_sample, results[1].prev_sample
    assert got.dtype == want.dtype and fast.fastdiff_report().fused == 1
    if draws or torch.isfinite(want).all():  # noise drawn in half precision has other values
        assert difference(got, want) < 2e-2
        if not draws:
            assert difference(got, exact) <= 2 * difference(want, exact) + 1e-6


def test_float64():
    plain = make("UniPCMultistepScheduler", SD)
    fast = fastdiff.as_fast(plain)
    want, got = (run(s, seed=None, x=start(s).double()) for s in (plain, fast))
    assert got[-1][0].dtype == torch.float64 and worst(got, want) < 1e-12
    run(fast)  # back to float32 in new memory
    assert fast.fastdiff_report().fused == 2 * STEPS


def test_inference_mode():
    plain = make("UniPCMultistepScheduler", SD)
    fast = fastdiff.as_fast(plain)
    with torch.inference_mode():
        assert worst(run(fast), run(plain)) < 3e-6
    assert worst(run(fast), run(plain)) < 3e-6 and fast.fastdiff_report().fused == 2 * STEPS


def test_layouts_and_other_dimensions():
    scheduler = make("DPMSolverMultistepScheduler", SD)
    fast = fastdiff.as_fast(scheduler)
    for shape in ((1, 7), (2, 3, 5), (2, 3, 4, 6), (1, 2, 3, 4, 5)):
        x = start(scheduler, shape)
        assert worst(run(fast, x=x), run(scheduler, x=x)) < 3e-6
    x = start(scheduler, (2, 3, 4, 6)).to(memory_format=torch.channels_last)
    assert worst(run(fast, x=x), run(scheduler, x=x)) < 3e-6
    assert not fast.fastdiff_report().stock
