"""The work of one `quantize` run: statistics, the swap of a block's layers, learned rounding, ranges."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.quant import observe
from fastdiff.quant.build import build_layer, build_measured, restore_layer, smoothing_of, weight_sqnr_db
from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.layer import QLayer, qlayers
from fastdiff.quant.measures import ratio_db
from fastdiff.quant.observers import ChannelObserver, RangeObserver
from fastdiff.quant.plan import LayerPlan, set_module
from fastdiff.quant.ranging import fix_ranges
from fastdiff.quant.reconstruct import learnable, reconstruct
from fastdiff.quant.schemes import Rounding, Smooth
from fastdiff.quant.steps import StepContext
from fastdiff.quant.temporal_block import TemporalBlock, feature_errors, find_block, stored_errors

Tensor = torch.Tensor


class Work:
    """The state of one run of `quantize`."""

    def __init__(
        self, net: nn.Module, plans: dict[str, LayerPlan], data: CalibrationSet | None, keep_originals: bool
    ) -> None:
        self.net, self.plans, self.data, self.keep = net, plans, data, keep_originals
        self.sequential = any(p.scheme.needs_moments for p in plans.values()) or learns(plans.values())
        self.channels: dict[str, ChannelObserver] = {}
        self.ranges: dict[str, RangeObserver] = {}
        self.originals: dict[str, nn.Module] = {}
        self.sqnr: dict[str, float] = {}
        self.block: TemporalBlock | None = None
        self.features: dict[str, Tensor] = {}

    def observe_channels(self, names: list[str], last: str | None = None) -> None:
        """Collects what smoothing and GPTQ need about the inputs of these layers."""
        wanted = [n for n in names if self.plans[n].scheme.needs_moments or self.plans[n].scheme.transform(Smooth)]
        self.channels = {n: ChannelObserver(self.plans[n].scheme.needs_moments) for n in wanted}
        if not wanted:
            return
        with observe.watching(self.net, {n: self._watcher(n) for n in wanted}):
            if last is None:
                return observe.run(self.net, self.data)
            with observe.stopping_after(self.net, last):
                observe.run(self.net, self.data)

    def _watcher(self, name: str) -> Callable[[Tensor], None]:
        layer, update = self.net.get_submodule(name), self.channels[name].update
        return (lambda x: update(patches(x, layer))) if isinstance(layer, nn.Conv2d) else update

    def quantize_block(self, block: str, names: list[str]) -> None:
        """Swaps the layers of one block; the inputs are those that the quantized layers before it produce."""
        if self.sequential:
            self.observe_channels(names, block)
        learned = [n for n in names if self.plans[n].scheme.rounding.kind == "adaround"]
        target = self._reference_output(block) if learned else None
        shared = self._shared_smoothing(names)
        for name in names:
            layer, plan = self.net.get_submodule(name), self.plans[name]
            made, sums = build_measured(layer, plan.scheme, self.channels.get(name), shared.get(name))
            self.sqnr[name] = ratio_db(*sums)
            self._swap(name, layer, made)
        if learned:
            self._learn(block, learned, target)
        for name in names:
            if name in learned:
                self.sqnr[name] = weight_sqnr_db(self.originals[name], self.net.get_submodule(name))
            if not self.keep:
                del self.originals[name]

    def _shared_smoothing(self, names: list[str]) -> dict[str, Tensor]:
        """Factors of layers that read one input, as queries, keys and values do: the same, so that it is scaled once."""
        smoothed = [n for n in names if n in self.channels and self.plans[n].scheme.transform(Smooth)]
        groups: list[list[str]] = []
        for name in smoothed:
            equal = lambda other, name=name: (
                self.plans[other].scheme == self.plans[name].scheme
                and torch.equal(self.channels[other].amax, self.channels[name].amax)
            )
            group = next((g for g in groups if equal(g[0])), None)
            groups.append([name]) if group is None else group.append(name)
        factors = {}
        for group in groups:
            weight = torch.cat([self.net.get_submodule(n).weight.detach().float() for n in group])
            made = smoothing_of(weight, self.plans[group[0]].scheme, self.channels[group[0]])
            factors |= dict.fromkeys(group, made)
        return factors

    def quantize_temporal(self, names: list[str]) -> None:
        """Swaps the layers of the temporal information block; learned rounding is learned for all of them at once."""
        learned = any(self.plans[n].scheme.rounding.kind == "adaround" for n in names)
        self.block = find_block(self.net, names, self.data)
        if self.block is not None:
            with torch.no_grad():
                self.features = self.block.outputs(self.net)
        target = (
            None
            if self.block is None
            else torch.cat([self.features[h] for e in self.block.embeddings for h in e.heads], 1)
        )
        for name in names:
            layer = self.net.get_submodule(name)
            self._swap(name, layer, build_layer(layer, self.plans[name].scheme))
        if learned and target is not None:
            weights: dict[str, Tensor] = {}
            for name in names:
                weights |= learnable(name, self.net.get_submodule(name), self.originals[name])
            forward = lambda rows: self.block.features(self.net, rows)
            reconstruct(self.net, weights, forward, target, self.plans[names[0]].scheme.rounding)
        for name in names:
            self.sqnr[name] = weight_sqnr_db(self.originals[name], self.net.get_submodule(name))

    def select_temporal(self, names: list[str]) -> dict[str, str]:
        """Puts back the layers whose rows are better kept than computed from codes; returns what decided, by layer."""
        with torch.no_grad():
            for layer in qlayers(self.net).values():
                if layer.steps is not None:
                    layer.steps.set(self.block.times)
            quantized = feature_errors(self.features, self.block.outputs(self.net))
        kept = stored_errors(self.features)
        decided = {}
        for name in names:
            component = name if name in kept else name.rpartition(".")[0]
            if kept[component] <= quantized[component]:
                set_module(self.net, name, self.originals[name])
                decided[name] = f"kept per step: error {kept[component]:.1e}, quantized {quantized[component]:.1e}"
        return decided

    def restore(self, names: list[str], tensors: dict[str, Tensor]) -> None:
        """Swaps the layers of a block that an earlier run had finished."""
        for name in names:
            layer = self.net.get_submodule(name)
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            made = restore_layer(layer, self.plans[name].scheme, own)
            self._swap(name, layer, made)
            self.sqnr[name] = weight_sqnr_db(layer, made)
            if not self.keep:
                del self.originals[name]

    def state_of(self, names: list[str]) -> dict[str, Tensor]:
        """The buffers of these layers by full name."""
        return {f"{n}.{k}": v for n in names for k, v in self.net.get_submodule(n).state_dict().items()}

    def fix_ranges(self) -> StepContext | None:
        """Fixes the ranges of static activations on the network with quantized weights; the steps they follow, or None."""
        for layer in qlayers(self.net).values():
            layer.enable_input(True)
        self.ranges, steps = fix_ranges(self.net, self.data, self.block)
        return steps

    def _swap(self, name: str, layer: nn.Module, made: nn.Module) -> None:
        self.originals[name] = layer
        for part in (module for module in made.modules() if isinstance(module, QLayer)):
            # weights are chosen with activations in floating point; their ranges come last
            part.enable_input(not self.sequential and not part.scheme.static_input)
        set_module(self.net, name, made)

    def _reference_output(self, block: str) -> Tensor:
        """What the block returns in the floating-point network."""
        quantized = {name: self.net.get_submodule(name) for name in self.originals}
        for name, layer in self.originals.items():
            set_module(self.net, name, layer)
        outs = observe.capture(self.net, block, self.data)[2]
        for name, layer in quantized.items():
            set_module(self.net, name, layer)
        return torch.cat(outs)

    def _learn(self, block: str, names: list[str], target: Tensor) -> None:
        args, kwargs, _ = observe.capture(self.net, block, self.data)
        merged = [_merge([a[i] for a in args]) for i in range(len(args[0]))]
        named = {key: _merge([k[key] for k in kwargs]) for key in kwargs[0]}
        take = lambda value, rows: value[rows] if isinstance(value, Tensor) else value
        module = self.net.get_submodule  # the block may itself be swapped while its rounding is learned
        forward = lambda rows: module(block)(
            *(take(a, rows) for a in merged), **{k: take(v, rows) for k, v in named.items()}
        )
        weights: dict[str, Tensor] = {}
        for name in names:
            weights |= learnable(name, module(name), self.originals[name])
        settings: Rounding = self.plans[names[0]].scheme.rounding
        reconstruct(self.net, weights, forward, target, settings)


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What every output pixel of a convolution sees, [B, L, K] in the order of its codes."""
    padding = tuple(k // 2 for k in conv.kernel_size) if conv.padding == "same" else conv.padding
    padding = (0, 0) if padding == "valid" else padding
    columns = F.unfold(x.float(), conv.kernel_size, padding=padding, stride=conv.stride)  # [B, C kh kw, L]
    return columns.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1).flatten(2)


def learns(plans: Any) -> bool:
    """Whether any layer has learned rounding."""
    return any(plan.scheme.rounding.kind == "adaround" for plan in plans)


def _merge(values: list[Any]) -> Any:
    """Batches of a tensor as one; other values must not depend on the batch."""
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]
