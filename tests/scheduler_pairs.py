"""Runs of a diffusers scheduler and of its fast copy on the same samples, outputs and noise."""

import inspect

import diffusers
import torch

SHAPE, STEPS = (2, 4, 6, 5), 20


def make(name, config):
    return getattr(diffusers, name).from_config(config)


def network(x, t):
    """A smooth stand-in for a model; t is a number or [B, 1, 1, 1]."""
    return (torch.tanh(0.7 * x + 0.1) * (0.5 + t / 2000.0) + 0.2 * torch.sin(x + 0.3)).to(x.dtype)


def start(scheduler, shape=SHAPE, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * getattr(scheduler, "init_noise_sigma", 1.0)
    return x.to(dtype)


def run(scheduler, call=None, *, seed=3, steps=STEPS, x=None, give_generator=False):
    """The results of all steps, or the generators after them; seed None leaves the noise to torch's global generator."""
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
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        result = scheduler.step(network(scaled, float(t)), t, x, return_dict=False, **call)
        x = result[0]
        results.append(result)
    return call.get("generator") if give_generator else results


def difference(got, want):
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def worst(got, want, place=slice(None)):
    pairs = [pair for a, b in zip(got, want, strict=True) for pair in zip(a[place], b[place], strict=True)]
    return max(difference(a, b) for a, b in pairs if a is not None)
