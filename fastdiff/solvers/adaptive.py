"""Solvers that choose their own steps: adaptive DPM-Solver pairs and RK45 on the probability-flow ODE.

They are the exception to tables: how many calls a run takes is known afterwards only.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from fastdiff.process import Level, Process, convert
from fastdiff.solvers.rk45 import rk45
from fastdiff.solvers.row import choose
from fastdiff.solvers.singlestep import second_weights, third_weights
from fastdiff.solvers.stages import level_at

Denoiser = Callable[[torch.Tensor, Sequence[Level]], torch.Tensor]
# a run of one group of samples: yields (state, level), is sent the data prediction, returns (state, accepted, rejected)
_Run = Generator[tuple[torch.Tensor, Level], torch.Tensor, tuple[torch.Tensor, int, int]]
_FIRST_STEP, _SAFETY = 0.05, 0.9  # in lambda (Lu et al. 2022, app. C)
_PID_ACCEPT, _PID_EPS = 0.81, 1e-8  # k-diffusion


@dataclass(frozen=True)
class AdaptiveStats:
    """What an adaptive run cost.

    accepted, rejected  steps per group: one entry for the whole batch, or one per sample
    calls               calls of the denoiser
    evaluations         samples evaluated in all calls together
    """

    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    calls: int
    evaluations: int


def solve_adaptive(
    denoise: Denoiser,
    x: torch.Tensor,
    process: Process,
    kind: str = "dpm-23",
    *,
    rtol: float | None = None,
    atol: float | None = None,
    interval: tuple[float, float] | None = None,
    norm: str = "batch",
) -> tuple[torch.Tensor, AdaptiveStats]:
    """Integrates the probability flow with error control. Returns the state at the end of `interval` and statistics.

    denoise     (x [M, ...], M levels) -> data predictions [M, ...]; `denoiser` makes one of a network
    x           [B, ...] float32 or float64: the state at the start
    kind        a key of KINDS: "dpm-12", "dpm-23" (Lu et al. 2022, app. C), "dpm-12-pid", "dpm-23-pid" (k-diffusion's
                controller), "rk45" (Dormand and Prince 1980, step control as in scipy)
    rtol, atol  tolerances; None is 0.05 and 0.0078 for dpm, 1e-5 and 1e-5 for rk45
    interval    (first, last) time, falling; None is t_max to t_min. The last level keeps its noise
    norm        "batch" couples the samples as the published controllers do: a sample's result depends on its batch.
                "sample" gives every sample its own steps; calls are still made together.

    Raises ValueError for unknown names and where lambda is infinite at an end of the interval.
    """
    run, tolerances = choose("kind", kind, KINDS)
    choose("norm", norm, ("batch", "sample"))
    rtol, atol = (given if given is not None else own for given, own in zip((rtol, atol), tolerances, strict=True))
    ends = process.levels((process.t_max, process.t_min) if interval is None else interval)
    if not all(math.isfinite(level.lam) for level in ends):
        raise ValueError("solve_adaptive: lambda is infinite at an end; give an interval inside (0, t_max)")
    if x.shape[0] == 0:
        return x.clone(), AdaptiveStats((), (), 0, 0)
    groups = [x] if norm == "batch" else list(x.split(1))
    results, calls, evaluations = _drive(denoise, [run(group, process, ends, rtol, atol) for group in groups])
    states, accepted, rejected = zip(*results, strict=True)
    return torch.cat(states), AdaptiveStats(accepted, rejected, calls, evaluations)


def denoiser(net: Callable, process: Process, prediction: str | tuple[float, float, float] = "noise") -> Denoiser:
    """The data prediction of a network called as net(scaled x, model time [M] float32)."""

    def denoise(x: torch.Tensor, levels: Sequence[Level]) -> torch.Tensor:
        column = lambda values: torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
        a, b, _ = zip(*(convert(prediction, "data", level) for level in levels), strict=True)
        time = torch.tensor([level.time for level in levels], dtype=torch.float32, device=x.device)
        scaled = column([process.input_scale(level) for level in levels]) * x
        return column(a) * x + column(b) * net(scaled, time).to(x.dtype)

    return denoise


def _drive(denoise: Denoiser, runs: Sequence[_Run]) -> tuple[list, int, int]:
    """Advances all runs together: one call of the denoiser serves every run that waits for one."""
    results, calls, evaluations = [None] * len(runs), 0, 0
    waiting = {index: next(run) for index, run in enumerate(runs)}
    while waiting:
        states = [x for x, _ in waiting.values()]
        levels = [level for x, level in waiting.values() for _ in range(x.shape[0])]
        data = denoise(torch.cat(states), levels).split([x.shape[0] for x in states])
        calls, evaluations, ready = calls + 1, evaluations + len(levels), list(waiting)
        for index, answer in zip(ready, data, strict=True):
            try:
                waiting[index] = runs[index].send(answer)
            except StopIteration as end:
                del waiting[index]
                results[index] = end.value
    return results, calls, evaluations


class _Threshold:
    """Accepts errors up to 1; the next step aims at 1 with a safety factor."""

    def __init__(self, order: int):
        self.order = order

    def norm(self, scaled: torch.Tensor) -> float:
        """The worst sample's root mean square."""
        return float(scaled.flatten(1).square().mean(1).sqrt().max())

    def judge(self, error: float) -> tuple[bool, float]:
        return error <= 1.0, _SAFETY * max(error, 1e-10) ** (-1.0 / self.order)


class _PID:
    """k-diffusion's controller with its defaults, whose only gain is the integral one: factor 1 + atan(e^(-1/order) - 1)."""

    def __init__(self, order: int):
        self.order = order

    def norm(self, scaled: torch.Tensor) -> float:
        """Root mean square over the whole group."""
        return float(scaled.square().mean().sqrt())

    def judge(self, error: float) -> tuple[bool, float]:
        factor = 1.0 + math.atan((1.0 / (error + _PID_EPS)) ** (1.0 / self.order) - 1.0)
        return factor >= _PID_ACCEPT, factor


def _dpm(order: int, controller: type) -> Callable[..., _Run]:
    """DPM-Solver of `order` with the embedded order below it, on noise predictions."""

    def run(x: torch.Tensor, process: Process, ends: list[Level], rtol: float, atol: float) -> _Run:
        (at, end), control, h = ends, controller(order), _FIRST_STEP
        before, first, accepted, rejected = x, None, 0, 0
        while at is not end:
            left = end.lam - at.lam
            to = end if h >= left * (1.0 - 1e-9) else level_at(process, at.lam + h)
            if first is None:  # a rejected step keeps its first prediction
                first = _noise(x, (yield x, at), at)
            low, high = yield from _pair(x, first, at, to, order, process)
            scale = torch.clamp(rtol * torch.maximum(low.abs(), before.abs()), min=atol)
            accept, factor = control.judge(control.norm((low - high) / scale))
            h = factor * (min(h, left) if controller is _Threshold else h)
            if accept:
                x, before, at, first, accepted = high, low, to, None, accepted + 1
            else:
                rejected += 1
        return x, accepted, rejected

    return run


def _noise(x: torch.Tensor, data: torch.Tensor, level: Level) -> torch.Tensor:
    return (x - level.alpha * data) / level.sigma


def _pair(x: torch.Tensor, first: torch.Tensor, at: Level, to: Level, order: int, process: Process) -> Generator:
    """The lower- and the higher-order result of a step, which share their calls; `first` is the noise predicted at x."""
    lam, h = at.lam, to.lam - at.lam
    inner = level_at(process, lam + h / order)
    one = _noise(step := _moved(x, at, inner, {0: first}, {}), (yield step, inner), inner)
    noises, r1 = {0: first, 1: one}, 1.0 / order
    second = _moved(x, at, to, noises, second_weights(at, to, r1, "noise", "midpoint"))
    if order == 2:
        return _moved(x, at, to, noises, {}), second
    node = level_at(process, lam + 2.0 * h / 3.0)
    noises[2] = _noise(
        step := _moved(x, at, node, noises, second_weights(at, node, 0.5, "noise", "heun")), (yield step, node), node
    )
    return second, _moved(x, at, to, noises, third_weights(at, to, r1, 2.0 / 3.0, "noise", "midpoint"))


def _moved(x: torch.Tensor, at: Level, to: Level, noises: dict, weights: dict[int, float]) -> torch.Tensor:
    """x moved from level to level; the weight of the first prediction follows from constant noise."""
    A = to.alpha / at.alpha
    result = A * x + (to.sigma - A * at.sigma - sum(weights.values())) * noises[0]
    for k, weight in weights.items():
        result = result + weight * noises[k]
    return result


KINDS: dict[str, tuple[Callable[..., _Run], tuple[float, float]]] = {
    "dpm-12": (_dpm(2, _Threshold), (0.05, 0.0078)),
    "dpm-23": (_dpm(3, _Threshold), (0.05, 0.0078)),
    "dpm-12-pid": (_dpm(2, _PID), (0.05, 0.0078)),
    "dpm-23-pid": (_dpm(3, _PID), (0.05, 0.0078)),
    "rk45": (rk45, (1e-5, 1e-5)),
}
