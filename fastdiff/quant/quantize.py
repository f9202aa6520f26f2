"""quantize(): walks a network block by block, swaps its layers for quantized ones, and can put them back."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import nn

from fastdiff.quant import observe
from fastdiff.quant.attention import AttentionHandle
from fastdiff.quant.build import restore_layer
from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.config import QuantConfig
from fastdiff.quant.correction import NAME, fit_correction, predictions
from fastdiff.quant.layer import QLayer
from fastdiff.quant.plan import LayerPlan, block_name, plan_layers, set_module
from fastdiff.quant.records import LayerRecord, record_of
from fastdiff.quant.schemes import Scheme, Smooth
from fastdiff.quant.shortcuts import find_shortcuts
from fastdiff.quant.steps import StepContext
from fastdiff.quant.work import Work, learns

Tensor = torch.Tensor


class Store(Protocol):
    """Keeps the finished blocks of a run, so that a killed one can go on."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under this key, or None."""

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors; a crash leaves the old entry or the new one."""


@dataclass
class Quantized:
    """A network that was quantized in place, and how.

    layers  one record per linear and convolution layer
    steps   the times of the per-step tables, or None
    """

    net: nn.Module
    config: QuantConfig
    layers: list[LayerRecord]
    steps: StepContext | None = None
    calibration: str | None = None
    _originals: dict[str, nn.Module] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the whole network."""
        return sum(t.nbytes for t in (*self.net.parameters(), *self.net.buffers()))

    def forget_originals(self) -> None:
        """Frees the original layers; `undo` is impossible from then on."""
        self._originals = {}

    def undo(self) -> nn.Module:
        """Puts the original layers back; RuntimeError unless they were kept."""
        if not self._originals and any(record.scheme for record in self.layers):
            raise RuntimeError("undo: the original layers were not kept; quantize with keep_originals=True")
        for name, layer in self._originals.items():
            set_module(self.net, name, layer)
        for handle in self._handles:
            handle.remove()
        if self.config.correct_output:
            delattr(self.net, NAME)
        return self.net


def quantize(
    net: nn.Module,
    config: QuantConfig,
    data: CalibrationSet | None = None,
    *,
    store: Store | None = None,
    keep_originals: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """Quantizes the linear and convolution layers of a network in place.

    data            what the network is called with, for schemes that need calibration
    store           finished blocks are kept there and taken from there
    keep_originals  so that `undo` works; they cost the memory of the floating-point weights
    progress        called with the name of every block that begins

    Without data the network is worked on one block at a time: at most one block exists in both forms.
    """
    plans = plan_layers(net, config)
    if config.split_shortcuts:
        plans = _split(plans, net, data)
    chosen = {plan.name: plan for plan in plans if plan.scheme is not None}
    temporal = [name for name, plan in chosen.items() if plan.temporal]
    _check_data(chosen.values(), config, data)
    before = predictions(net, data) if config.correct_output else None
    auto = config.temporal.mode == "auto"
    work = Work(net, chosen, data, keep_originals or auto or learns(chosen.values()))
    if temporal:
        work.quantize_temporal(temporal)
    _quantize_blocks(work, config, store, progress or (lambda block: None))
    steps = work.fix_ranges()
    kept = work.select_temporal(temporal) if auto and work.block is not None else {}
    plans = [LayerPlan(p.name, None, kept[p.name], True) if p.name in kept else p for p in plans]
    records = [record_of(net, plan, work) for plan in plans]
    made = Quantized(net, config, records, steps, None if data is None else data.digest())
    made._originals = work.originals if keep_originals else {}
    if steps is not None:
        made._handles.append(steps.follow(net))
    if config.attention == "int8":
        made._handles.append(AttentionHandle(net))
    if before is not None:
        made._handles.append(fit_correction(before, predictions(net, data), data).attach(net))
    return made


def apply_state(
    net: nn.Module, schemes: dict[str, Scheme], tensors: dict[str, Tensor], steps: StepContext | None = None
) -> None:
    """Swaps layers for quantized ones whose stored tensors are given, and makes them follow the steps."""
    for name, scheme in schemes.items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        layer = restore_layer(net.get_submodule(name), scheme, own)
        for part in (module for module in layer.modules() if isinstance(module, QLayer)):
            part.steps = steps if part.input_scale is not None and part.input_scale.numel() > 1 else None
        set_module(net, name, layer)


def _quantize_blocks(work: Work, config: QuantConfig, store: Store | None, progress: Callable[[str], None]) -> None:
    """Everything outside of the temporal block, block by block; finished ones come from the store."""
    net, data, done = work.net, work.data, ""
    others = {name: plan for name, plan in work.plans.items() if not plan.temporal}
    blocks = _blocks(net, others, data)
    if not work.sequential and any(plan.scheme.transform(Smooth) for plan in others.values()):
        work.observe_channels(list(others))
    for index, (block, names) in enumerate(blocks):
        progress(block)
        if store is None:
            work.quantize_block(block, names)
            continue
        done = _fingerprint(done, net, names, config, data)
        key = f"{index:04d}-{done}"
        stored = store.get(key)
        if stored is not None:
            work.restore(names, stored)
        else:
            work.quantize_block(block, names)
            store.put(key, work.state_of(names))


def _blocks(net: nn.Module, plans: dict[str, LayerPlan], data: CalibrationSet | None) -> list[tuple[str, list[str]]]:
    blocks: dict[str, list[str]] = {}
    for name in plans:
        blocks.setdefault(block_name(name), []).append(name)
    order = list(blocks) if data is None else observe.execution_order(net, list(blocks), data)
    return [(name, blocks[name]) for name in order]


def _split(plans: list[LayerPlan], net: nn.Module, data: CalibrationSet | None) -> list[LayerPlan]:
    if data is None:
        raise ValueError("quantize: split_shortcuts looks for concatenations in a call of the network; give data=")
    cuts = find_shortcuts(net, data)
    split = lambda p: replace(p, scheme=replace(p.scheme, split_input=cuts[p.name]), note=f"split at {cuts[p.name]}")
    return [split(plan) if plan.scheme is not None and plan.name in cuts else plan for plan in plans]


def _check_data(plans: Any, config: QuantConfig, data: CalibrationSet | None) -> None:
    if data is None and any(plan.temporal for plan in plans):
        raise ValueError("quantize: the temporal block is quantized for the times of a calibration set; give data=")
    if data is None and config.correct_output:
        raise ValueError("quantize: the output is corrected for the times of a calibration set; give data=")
    needy = next((plan.name for plan in plans if plan.scheme.needs_data), None)
    if needy is not None and data is None:
        raise ValueError(
            f"quantize: the scheme of {needy} needs calibration data; give data=, or use a recipe without"
        )


def _fingerprint(
    before: str, net: nn.Module, names: list[str], config: QuantConfig, data: CalibrationSet | None
) -> str:
    """Hash of everything that decides the codes of a block; `before` is that of the block before it."""
    sha = hashlib.sha256((before + config.to_json()).encode())
    sha.update(b"" if data is None else data.digest().encode())
    for name in names:
        weight = net.get_submodule(name).weight.detach().cpu().contiguous()
        sha.update(f"{name}{list(weight.shape)}".encode())
        sha.update(weight.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:24]
