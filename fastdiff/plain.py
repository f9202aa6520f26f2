"""The same sampling with ordinary torch operations: what the engine is measured against, and an independent check of it."""

from collections.abc import Callable

import torch

from fastdiff.ops.solver_step import COEF, META
from fastdiff.plan import Plan

_COLUMN = {name: index for index, name in enumerate(COEF)}


def plain_sample(net: Callable, plan: Plan, x: torch.Tensor, cond: dict, negative: dict | None = None) -> torch.Tensor:
    """Runs a plan whose samples share one deterministic table, with eager torch operations only.

    x  [B, ...] the initial state; cond, negative  keyword tensors of net, first dimension B

    Raises ValueError for stochastic or mixed plans: those need noise and tables per sample.
    """
    table, rows = plan.tables[0], plan.rows[:, 0]
    if (plan.rows != rows[:, None]).any() or plan.coef[:, [_COLUMN["C0"], _COLUMN["C1"]]].any():
        raise ValueError("plain_sample: all samples must run the same deterministic solver")
    slots: dict[int, torch.Tensor] = {}
    for r in rows:
        c, slot = (
            dict(zip(COEF, plan.coef[r].tolist(), strict=True)),
            dict(zip(META, plan.meta[r].tolist(), strict=True)),
        )
        time = torch.full((x.shape[0],), float(table.time[r - rows[0]]), device=x.device)
        scaled = float(table.c_in[r - rows[0]]) * x
        h = c["a"] * x + c["b0"] * net(scaled, time, **cond)
        if c["b1"] != 0.0:
            h = h + c["b1"] * net(scaled, time, **negative)
        h, raw = h.clamp(c["lo"], c["hi"]), h
        new = c["A"] * x + c["B"] * h + c["R"] * raw + c["E"]
        for s, value in slots.items():
            new = new + c[f"S{s}"] * value
        slots |= {slot["slot_x"]: x} if slot["slot_x"] >= 0 else {}
        slots |= {slot["slot_h"]: h} if slot["slot_h"] >= 0 else {}
        x = new
    return x
