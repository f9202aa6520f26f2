"""RK45 on the probability-flow ODE, step for step as scipy's."""

import math
from collections.abc import Generator

import numpy as np
import torch

from fastdiff.process import Level, Process

# Dormand and Prince 1980: nodes, stage weights, step weights, and the difference to the fourth-order step
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_STEP = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_DIFFERENCE = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)


def rk45(x: torch.Tensor, process: Process, ends: list[Level], rtol: float, atol: float) -> Generator:
    """Embedded Runge-Kutta of order 5(4) on dx/dt, with scipy's choice of the first step and of all others.

    A generator that yields (state, level), is sent the data prediction, and returns (state, accepted, rejected) steps.
    """
    t, t_end = ends[0].t, ends[1].t
    sign, accepted, rejected = (1.0 if t_end > t else -1.0), 0, 0
    rms = lambda v: float(v.square().mean().sqrt())
    slope = yield from _slope(x, t, process)
    h = yield from _first_step(x, slope, t, abs(t_end - t), sign, process, rtol, atol)
    while t != t_end:
        retried = False
        h = max(h, 10.0 * abs(math.nextafter(t, sign * math.inf) - t))
        while True:
            t_new = t_end if sign * (t + sign * h - t_end) > 0 else t + sign * h
            h = abs(t_new - t)
            slopes = [slope]
            for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
                step = sum(w * k for w, k in zip(weights, slopes, strict=True)) * (sign * h)
                slopes.append((yield from _slope(x + step, t + node * sign * h, process)))
            new = x + sign * h * sum(w * k for w, k in zip(_STEP, slopes, strict=True))
            slopes.append((yield from _slope(new, t + sign * h, process)))
            error = sign * h * sum(w * k for w, k in zip(_DIFFERENCE, slopes, strict=True))
            size = rms(error / (atol + torch.maximum(x.abs(), new.abs()) * rtol))
            if size < 1.0:
                break
            h, rejected, retried = h * max(0.2, 0.9 * size**-0.2), rejected + 1, True
        h *= min(1.0 if retried else 10.0, 10.0 if size == 0.0 else 0.9 * size**-0.2)
        x, t, slope, accepted = new, t_new, slopes[-1], accepted + 1
    return x, accepted, rejected


def _slope(x: torch.Tensor, t: float, process: Process) -> Generator:
    """dx/dt of the probability flow: the velocity at fixed data and noise."""
    level = process.levels(np.array([t]))[0]
    data = yield x, level
    return level.alpha_rate * data + level.sigma_rate * (x - level.alpha * data) / level.sigma


def _first_step(
    x, slope, t: float, length: float, sign: float, process: Process, rtol: float, atol: float
) -> Generator:
    """The first step of Hairer, Norsett and Wanner 1993, II.4, as scipy takes it; costs one call."""
    scale = atol + x.abs() * rtol
    rms = lambda v: float((v / scale).square().mean().sqrt())
    d0, d1 = rms(x), rms(slope)
    h0 = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, length)
    ahead = yield from _slope(x + h0 * sign * slope, t + h0 * sign, process)
    d2 = rms(ahead - slope) / h0
    h1 = max(1e-6, h0 * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2
    return min(100.0 * h0, h1, length)
