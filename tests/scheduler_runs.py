"""Runs of scheduler objects and of solver tables side by side, on the same inputs and the same noise."""

import numpy as np
import torch

from fastdiff.ops.solver_step import COEF
from fastdiff.solvers.compat.twin import float64_twin

SIZE = 48


def network(x, t):
    """A smooth nonlinear stand-in for a model; `t` is its time input."""
    return np.tanh(0.7 * x + 0.1) * (0.5 + float(t) / 2000.0) + 0.2 * np.sin(x + 0.3)


def start():
    return np.random.default_rng(5).standard_normal(SIZE)


def draws_like(calls):
    """Noise by (call, place in the call)."""
    random = np.random.default_rng(6)
    return {(call, place): random.standard_normal(SIZE) for call in range(calls) for place in range(2)}


def run_scheduler(scheduler, steps, x, draws, *, wide=True, timestep_options=None, step_options=None):
    """(final state, the model inputs of all calls) of a scheduler; `wide` computes in float64, else in float32."""
    now = [0, 0]

    def draw(shape):
        now[1] += 1
        return torch.from_numpy(draws[now[0], now[1] - 1]).reshape(shape).to(torch.float64 if wide else torch.float32)

    twin = float64_twin(scheduler, draw, wide=wide)
    twin.set_timesteps(*([steps] if steps else []), **(timestep_options or {}))
    x = torch.from_numpy(x * float(getattr(twin, "init_noise_sigma", 1.0))).reshape(1, 1, 1, -1)
    x, seen = (x if wide else x.float()), []
    for i, t in enumerate(twin.timesteps):
        now[:] = [i, 0]
        scaled = twin.scale_model_input(x, t) if hasattr(twin, "scale_model_input") else x
        seen.append(scaled.double().numpy().ravel())
        m = torch.from_numpy(network(seen[-1], t)).reshape(x.shape).to(x.dtype)
        x = twin.step(m, t, x, **(step_options or {})).prev_sample
    return x.double().numpy().ravel(), seen


def run_table(table, x, noise):
    """(final state, the model inputs of all calls) of a table in float64, straight from the definition of a row.

    noise  (step, stream) -> array
    """
    slots, seen = np.zeros((max(table.slots, 1), x.size)), []
    for r in range(len(table)):
        k = dict(zip(COEF, table.coef[r], strict=True))
        slot_h, slot_x, step0, stream0, step1, stream1 = table.meta[r].tolist()
        seen.append(table.c_in[r] * x)
        raw = k["a"] * x + k["b0"] * network(seen[-1], table.time[r])
        h = np.clip(raw, k["lo"], k["hi"])
        new = k["A"] * x + k["B"] * h + k["R"] * raw + sum(k[f"S{s}"] * slots[s] for s in range(table.slots))
        for name, key in (("C0", (step0, stream0)), ("C1", (step1, stream1))):
            new = new + (k[name] * noise[key] if k[name] else 0.0)
        if slot_x >= 0:
            slots[slot_x] = x
        if slot_h >= 0:
            slots[slot_h] = h
        x = new
    return x, seen


def difference(got, want):
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
