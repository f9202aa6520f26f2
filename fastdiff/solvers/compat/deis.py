"""DEIS as diffusers publishes it: log kappa, and weights that are differences of antiderivatives in float32.

The antiderivatives of a short step are nearly equal, so that their difference loses up to three digits: over 20 steps of order 3
the published samples stand 2e-5 from those of the exact weights, over 50 steps 3e-4. Whoever wants the same samples
needs the same rounding.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fastdiff.process import Level, Process
from fastdiff.solvers.compat import grids
from fastdiff.solvers.multistep import dpm_rows
from fastdiff.solvers.row import Row, Solver, choose


def deis(config: Mapping, times: np.ndarray) -> Solver:
    """The solver of a DEISMultistepScheduler; config["precision"] is "stock" (its weights) or "float64" (exact ones)."""
    order = int(config["solver_order"])
    below = 15 if config["lower_order_final"] else 0
    options = {"order": choose("solver_order", order, (1, 2, 3)), "history": "noise", "lower_order_below": below}
    exact = partial(dpm_rows, **options, solver_type="heun", third="exact")
    if config["precision"] == "float64":
        return Solver("deis", exact, order=order, history="noise")
    rows = partial(_published_rows, exact, _kappas(config, times))
    # what float32 leaves of the weights' sum is exact on constant noise to 1e-6 only
    return Solver("deis", rows, order=order, history="noise", exact=frozenset({"data"}))


def _published_rows(exact, kappas: np.ndarray, levels: list[Level], process: Process) -> list[Row]:
    """The exact rows with the published weights; steps of order 1 have a closed form and keep theirs."""
    rows = []
    for r, row in enumerate(exact(levels, process)):
        made = _WEIGHTS[len(row.B)](kappas[r + 1], *kappas[r::-1][: len(row.B)]) if len(row.B) > 1 else None
        rows.append(row if made is None else replace(row, B=_scaled(made, r, row.to.alpha)))
    return rows


def _scaled(weights: list[np.float32], r: int, alpha: float) -> dict[int, float]:
    return {r - k: alpha * float(weight) for k, weight in enumerate(weights)}


def _kappas(config: Mapping, times: np.ndarray) -> np.ndarray:
    """[n + 1] float32 kappas of integer times, and once more that of time 0, rounded where the class rounds."""
    # in torch, whose square roots may differ from numpy's in the last bit
    products = torch.from_numpy(grids.alphas_cumprod(config)).float()
    sigmas = (((1 - products) / products) ** 0.5)[np.append(times, 0).astype(int)]
    alphas = 1 / (sigmas**2 + 1) ** 0.5
    return (sigmas * alphas / alphas).numpy()


def _second(to, at, before) -> list[np.float32]:
    """Weights of two predictions, at log kappa of `at` and `before`, in int_at^to dkappa."""

    def antiderivative(kappa, own, other):
        return kappa * (-np.log(other) + np.log(kappa) - 1) / (np.log(own) - np.log(other))

    return [antiderivative(to, *ends) - antiderivative(at, *ends) for ends in ((at, before), (before, at))]


def _third(to, at, before, first) -> list[np.float32]:
    """Weights of three predictions, with the terms in the published order."""

    def antiderivative(kappa, own, b, c):
        log, own, b, c = np.log(kappa), np.log(own), np.log(b), np.log(c)
        return kappa * (b * (c - log + 1) - c * log + c + log**2 - 2 * log + 2) / ((own - b) * (own - c))

    turns = ((at, before, first), (before, first, at), (first, at, before))
    return [antiderivative(to, *nodes) - antiderivative(at, *nodes) for nodes in turns]


_WEIGHTS = {2: _second, 3: _third}
