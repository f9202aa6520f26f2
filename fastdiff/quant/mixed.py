"""Mixed precision: measures what every layer costs the output under every candidate scheme, then spends a budget."""

import contextlib
import operator
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastdiff.quant.build import build_layer
from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.config import QuantConfig
from fastdiff.quant.correction import predictions
from fastdiff.quant.measures import energies
from fastdiff.quant.plan import adapt, plan_layers, set_module
from fastdiff.quant.schemes import Scheme, one_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class Cost:
    """What one layer costs under one scheme.

    noise   energy of the output's error, relative to the output's, when only this layer is quantized
    nbytes  of the layer
    ms      that its calls for the samples took
    """

    noise: float
    nbytes: int
    ms: float = 0.0


def three_times(data: CalibrationSet, rows: int = 8) -> CalibrationSet:
    """The first samples at an early, a middle and a late time: enough to rank layers."""
    times = data.times[[0, len(data.times) // 2, len(data.times) - 1]].unique()
    keep = torch.cat([(data.t == t).nonzero().flatten()[:rows] for t in times])
    x, t, cond = data.rows(keep)
    return CalibrationSet(x, t, cond)


def sensitivity(
    net: nn.Module, config: QuantConfig, candidates: dict[str, Scheme | None], data: CalibrationSet
) -> dict[str, dict[str, Cost]]:
    """Cost of every layer that `config` quantizes, under every candidate; the network is left as it was.

    candidates  schemes that need no calibration, by name; None is the layer as it is
    data        a few samples, as `three_times` gives
    """
    needy = next((name for name, scheme in candidates.items() if scheme is not None and scheme.needs_data), None)
    if needy is not None:
        raise ValueError(f"sensitivity: candidates are tried without calibration, but {needy} needs it")
    want = predictions(net, data)
    costs: dict[str, dict[str, Cost]] = {}
    for name in (plan.name for plan in plan_layers(net, config) if plan.scheme is not None):
        layer = net.get_submodule(name)
        costs[name] = {}
        for key, scheme in candidates.items():
            made = layer if scheme is None else build_layer(layer, adapt(name, layer, scheme).scheme)
            set_module(net, name, made)
            with _clock(made) as times:
                signal, noise = energies(want, predictions(net, data))
            nbytes = sum(t.nbytes for t in (*made.parameters(), *made.buffers()))
            costs[name][key] = Cost(noise / max(signal, 1e-30), nbytes, 1e3 * sum(times))
        set_module(net, name, layer)
    return costs


@contextlib.contextmanager
def _clock(layer: nn.Module) -> Iterator[list[float]]:
    """Seconds of every call of the layer; the first, which may prepare weights, is left out where there are more."""
    times: list[float] = []
    begin = layer.register_forward_pre_hook(lambda *_: times.append(-time.perf_counter()))
    end = layer.register_forward_hook(lambda *_: times.append(times.pop() + time.perf_counter()))
    try:
        yield times
    finally:
        begin.remove()
        end.remove()
        del times[: len(times) > 1]


def spend(costs: dict[str, dict[str, Cost]], budget: float, of: str = "nbytes") -> dict[str, str]:
    """The candidate of every layer, so that all layers together take at most `budget` bytes, or with of="ms" milliseconds.

    Starts from the least noise everywhere and takes the step that adds least noise per byte (millisecond) saved, as noise
    adds up over layers. Raises ValueError when even the smallest candidates do not fit.
    """
    one_of("mixed: of", of, ("nbytes", "ms"))
    price = operator.attrgetter(of)
    least = sum(min(map(price, layer.values())) for layer in costs.values())
    if least > budget:
        raise ValueError(f"mixed: the smallest candidates take {least:g} {of}, the budget is {budget:g}")
    chosen = {name: min(layer, key=lambda k, layer=layer: layer[k].noise) for name, layer in costs.items()}
    total = lambda: sum(price(costs[name][key]) for name, key in chosen.items())
    while total() > budget:
        steps = [
            (
                (cost.noise - costs[name][chosen[name]].noise) / (price(costs[name][chosen[name]]) - price(cost)),
                name,
                key,
            )
            for name, layer in costs.items()
            for key, cost in layer.items()
            if price(cost) < price(costs[name][chosen[name]])
        ]
        _, name, key = min(steps)
        chosen[name] = key
    return chosen


def mix(config: QuantConfig, candidates: dict[str, Scheme | None], chosen: dict[str, str]) -> QuantConfig:
    """`config` with the chosen scheme of every layer as an override of its exact name."""
    exact = tuple((f"^{re.escape(name)}$", candidates[key]) for name, key in chosen.items())
    return replace(config, overrides=(*exact, *config.overrides))
