"""Mixed precision: measures what every layer costs the output under every candidate scheme, then spends a budget."""

import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastdiff.quant.build import build_layer
from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.config import QuantConfig
from fastdiff.quant.correction import predictions
from fastdiff.quant.measures import energies
from fastdiff.quant.plan import adapt, plan_layers, set_module
from fastdiff.quant.schemes import Scheme

Tensor = torch.Tensor


@dataclass(frozen=True)
class Cost:
    """What one layer costs under one scheme.

    noise   energy of the output's error, relative to the output's, when only this layer is quantized
    nbytes  of the layer
    """

    noise: float
    nbytes: int


def three_times(data: CalibrationSet, rows: int = 8) -> CalibrationSet:
    """The first samples at an early, a middle and a late time: enough to rank layers."""
    times = data.times[[0, len(data.times) // 2, len(data.times) - 1]].unique()
    keep = torch.cat([(data.t == t).nonzero().flatten()[:rows] for t in times])
    x, t, cond = data.rows(keep)
    return CalibrationSet(x, t, cond)


def sensitivity(
    net: nn.Module, config: QuantConfig, candidates: dict[str, Scheme], data: CalibrationSet
) -> dict[str, dict[str, Cost]]:
    """Cost of every layer that `config` quantizes, under every candidate; the network is left as it was.

    candidates  schemes that need no calibration, by name
    data        a few samples, as `three_times` gives
    """
    needy = next((name for name, scheme in candidates.items() if scheme.needs_data), None)
    if needy is not None:
        raise ValueError(f"sensitivity: candidates are tried without calibration, but {needy} needs it")
    want = predictions(net, data)
    costs: dict[str, dict[str, Cost]] = {}
    for name in (plan.name for plan in plan_layers(net, config) if plan.scheme is not None):
        layer = net.get_submodule(name)
        costs[name] = {}
        for key, scheme in candidates.items():
            fitted = adapt(name, layer, scheme).scheme
            made = build_layer(layer, fitted)
            set_module(net, name, made)
            signal, noise = energies(want, predictions(net, data))
            costs[name][key] = Cost(noise / max(signal, 1e-30), sum(b.nbytes for b in made.buffers()))
        set_module(net, name, layer)
    return costs


def spend(costs: dict[str, dict[str, Cost]], budget: int) -> dict[str, str]:
    """The candidate of every layer, so that all layers together take at most `budget` bytes.

    Starts from the least noise everywhere and takes the step that adds least noise per byte saved, as noise adds up
    over layers. Raises ValueError when even the smallest candidates do not fit.
    """
    least = sum(min(c.nbytes for c in layer.values()) for layer in costs.values())
    if least > budget:
        raise ValueError(f"mixed: the smallest candidates take {least} bytes, the budget is {budget}")
    chosen = {name: min(layer, key=lambda k, layer=layer: layer[k].noise) for name, layer in costs.items()}
    total = lambda: sum(costs[name][key].nbytes for name, key in chosen.items())
    while total() > budget:
        steps = [
            (
                (cost.noise - costs[name][chosen[name]].noise) / (costs[name][chosen[name]].nbytes - cost.nbytes),
                name,
                key,
            )
            for name, layer in costs.items()
            for key, cost in layer.items()
            if cost.nbytes < costs[name][chosen[name]].nbytes
        ]
        _, name, key = min(steps)
        chosen[name] = key
    return chosen


def mix(config: QuantConfig, candidates: dict[str, Scheme], chosen: dict[str, str]) -> QuantConfig:
    """`config` with the chosen scheme of every layer as an override of its exact name."""
    exact = tuple((f"^{re.escape(name)}$", candidates[key]) for name, key in chosen.items())
    return replace(config, overrides=(*exact, *config.overrides))
