"""Fixes the ranges of static activations, after the weights have been quantized."""

import torch
from torch import nn

from fastdiff.quant import observe
from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.layer import QLayer, qlayers
from fastdiff.quant.observers import RangeObserver
from fastdiff.quant.steps import StepContext
from fastdiff.quant.temporal_block import TemporalBlock

Ranges = dict[str, RangeObserver]


def fix_ranges(
    net: nn.Module, data: CalibrationSet | None, block: TemporalBlock | None
) -> tuple[Ranges, StepContext | None]:
    """Observes every layer with static activations and sets its ranges.

    returns  the observers by layer, and what ranges per step follow (None when there are none)
    """
    static = {name: layer for name, layer in qlayers(net).items() if layer.scheme.static_input}
    if not static:
        return {}, None
    steps = StepContext(data.times)
    for layer in static.values():
        layer.enable_input(False)
    ranges = {name: RangeObserver(len(data.times)) for name in static}
    handle = steps.follow(net)
    with observe.watching(net, {name: _watcher(layer, ranges[name], steps) for name, layer in static.items()}):
        observe.run(net, data)
    handle.remove()
    for name, layer in static.items():
        _fix(layer, ranges[name], steps)
        layer.enable_input(True)
    if block is not None:
        ranges |= _fix_temporal(net, static, block, steps)
    per_step = any(layer.scheme.input.per_step for layer in static.values())
    return ranges, steps if per_step else None


def _fix_temporal(net: nn.Module, static: dict[str, QLayer], block: TemporalBlock, steps: StepContext) -> Ranges:
    """Ranges inside the temporal block hold what its quantized layers produce: nothing is clipped at these times."""
    steps.set(block.times)
    ranges: Ranges = {}
    for stage in block.stages:
        layers = {name: static[name] for name in stage if name in static}
        ranges |= {name: RangeObserver(len(steps.times)) for name in layers}
        watchers = {name: _watcher(layer, ranges[name], steps) for name, layer in layers.items()}
        with observe.watching(net, watchers), torch.no_grad():
            block.outputs(net)
        for name, layer in layers.items():
            _fix(layer, ranges[name], steps)
    return ranges


def _watcher(layer: QLayer, observer: RangeObserver, steps: StepContext):
    return lambda x: observer.update(layer.transformed(x), steps.rows)


def _fix(layer: QLayer, observer: RangeObserver, steps: StepContext) -> None:
    spec = layer.scheme.input
    layer.set_input_range(*observer.table(spec), steps if spec.per_step else None)
