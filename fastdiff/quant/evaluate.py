"""evaluate(): how far a quantized network's predictions, trajectories and pictures are from the original's."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastdiff.quant.calibration import trajectories
from fastdiff.quant.measures import psnr_db, sqnr_db, ssim
from fastdiff.quant.perceptual import frechet_distance, lpips_distance
from fastdiff.quant.steps import StepContext

Tensor = torch.Tensor

_ROUNDS = 3  # timings of either network, interleaved
_CEILING = 200.0  # what an infinite ratio in dB is reported as: JSON has no infinity


def evaluate(
    reference: Any, quantized: Any, shape: Sequence[int], *, seed: int = 0, **settings: Any
) -> dict[str, Any]:
    """Compares two samplers (fastdiff.Sampler) whose networks differ, from the same noise.

    shape     [B, C, H, W];  settings  those of `Sampler.sample`, as solver, steps, cond

    Returns JSON values: `psnr_db` and `ssim` of the final pictures, mean over samples; `noise_sqnr_db` per step, of the
    network's outputs on the original's trajectory; `steps`, the divergence of the free-running trajectories; `ms`, the
    time of one network call of B rows for either; and the pictures themselves under `images` (not JSON). Where the package
    lpips is installed, pictures and steps have `lpips`.
    """
    inputs = trajectories(reference, shape, seed=seed, **settings)
    noise, times = [], [float(t) for t in inputs.times]
    with torch.no_grad():
        for t in inputs.times:
            x, time_, cond = inputs.rows(inputs.t == t)
            noise.append(_finite(sqnr_db(reference.net(x, time_, **cond), quantized.net(x, time_, **cond))))
    steps, images, lpips = [], None, lpips_distance()
    runs = (sampler.step(shape, seed=seed, **settings) for sampler in (reference, quantized))
    for a, b in zip(*runs, strict=True):
        images = (a.x, b.x)
        step = {"psnr_db": _mean(psnr_db(*images)), "ssim": _ssim(*images), "sqnr_db": _finite(sqnr_db(*images))}
        steps.append(step | ({} if lpips is None else {"lpips": round(lpips(*images), 5)}))
    return {
        **({} if lpips is None else {"lpips": steps[-1]["lpips"]}),
        "psnr_db": steps[-1]["psnr_db"],
        "ssim": steps[-1]["ssim"],
        "noise_sqnr_db": noise,
        "noise_sqnr_db_min": min(noise),
        "times": times,
        "steps": steps,
        "ms": _time(reference.net, quantized.net, inputs.rows(slice(0, shape[0]))),
        "images": images,
    }


def layer_sqnr_db(
    reference: nn.Module, quantized: nn.Module, names: list[str], data: Any, steps: StepContext | None
) -> dict[str, float]:
    """Signal-to-noise ratio of every layer's output for the inputs that it has in the original network.

    names  the quantized layers;  data  a CalibrationSet;  steps  what the per-step ranges of `quantized` follow
    """
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}

    def compare(name: str):
        layer, total = quantized.get_submodule(name), sums[name]

        def see(_: nn.Module, args: tuple, out: Tensor) -> None:
            total[0] += float(out.double().square().sum())
            total[1] += float((out.double() - layer(args[0]).double()).square().sum())

        return see

    handles = [reference.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    handles += [] if steps is None else [steps.follow(reference)]
    try:
        with torch.no_grad():
            for x, t, cond in data.batches():
                reference(x, t, **cond)
    finally:
        for handle in handles:
            handle.remove()
    ratio = lambda signal, noise: 10 * float(torch.log10(torch.tensor(signal / noise))) if noise else float("inf")
    return {name: _finite(ratio(*total)) for name, total in sums.items()}


def frechet(
    images: tuple[Tensor, Tensor], features: Callable[[Tensor], Tensor], real: Tensor | None = None
) -> dict[str, float]:
    """Frechet distances of pictures of the original and of the quantized network.

    features  pictures [B, C, H, W] in [-1, 1] to [B, D];  real  pictures that both are compared with; without them the
    quantized network's are compared with the original's
    """
    with torch.no_grad():
        original, quantized = (features(part) for part in images)
        target = original if real is None else features(real)
    found = {"frechet": round(frechet_distance(quantized, target), 4)}
    return found if real is None else found | {"frechet_reference": round(frechet_distance(original, target), 4)}


def check_gate(result: dict[str, Any], gate: dict[str, float]) -> list[str]:
    """What the result fails: one sentence per bound that it does not reach. A gate maps keys of it to lower bounds."""
    for key in gate:
        if not isinstance(result.get(key), (int, float)):
            known = ", ".join(k for k, v in result.items() if isinstance(v, float))
            raise ValueError(f"gate: unknown figure {key!r}; known are {known}")
    return [f"{key} is {result[key]:.2f}, below {bound:g}" for key, bound in gate.items() if not result[key] >= bound]


def _time(reference: nn.Module, quantized: nn.Module, inputs: tuple) -> dict[str, float]:
    """Least of a few calls of either network in turn, in milliseconds."""
    x, t, cond = inputs
    taken: dict[str, list[float]] = {"reference": [], "quantized": []}
    with torch.no_grad():
        for _ in range(_ROUNDS):
            for name, net in (("reference", reference), ("quantized", quantized)):
                start = time.perf_counter()
                net(x, t, **cond)
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(min(values), 3) for name, values in taken.items()}


def _ssim(a: Tensor, b: Tensor) -> float | None:
    """None for pictures that are smaller than the window."""
    return _mean(ssim(a, b)) if min(a.shape[-2:]) >= 11 else None


def _mean(values: Tensor) -> float:
    return _finite(float(values.clamp(max=_CEILING).mean()))


def _finite(value: float) -> float:
    return round(max(-_CEILING, min(value, _CEILING)), 4) if value == value else 0.0
