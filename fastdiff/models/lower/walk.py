"""Any other module: its linear layers, convolutions, norms and attention are replaced one by one."""

from collections import Counter

import torch
from torch import nn

from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.record import LayerRecord, Record, Settings, UnsupportedError
from fastdiff.models.lower.walk_attention import FusedAttention
from fastdiff.models.lower.walk_choice import Always, Timed
from fastdiff.models.lower.walk_layers import MAKERS, NORMS, Layer
from fastdiff.models.lower.walk_processors import PROCESSORS, FusedProcessor


class Walked:
    """A module some of whose layers run on fused kernels.

    Which ones is a fixed rule, so that equal runs have equal bits: products and attention are ours, norms by themselves are
    torch's. With `deterministic="off"` each layer is timed against the module's own at its first call, on the real input,
    and keeps the faster; with "batch" all that can be is ours, since our rows do not depend on the batch.
    """

    def __init__(self, module: nn.Module, settings: Settings, reason: str) -> None:
        if not settings.keep_original:
            raise ValueError(
                f"accelerate: keep_original=False needs a lowered family, and {type(module).__name__} is not one: {reason}"
            )
        self.module, self.settings = module, settings
        self.set_up_s, self.keeps_original = 0.0, True
        self.calls: Counter[str] = Counter()
        self._choose = Timed if settings.deterministic == "off" else Always
        self._attention = FusedAttention(settings.numbers.attention, self._choose)
        self._layers: list[Layer] = []
        self._processors: list[tuple[str, nn.Module, FusedProcessor]] = []
        self._pack(reason)

    def _pack(self, reason: str) -> None:
        record = self._packed = Record()
        record.add(type(self.module).__name__, "its own forward", reason)
        self._left: list[LayerRecord] = record.layers
        products = [name for name, layer in self.module.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]
        ends = {name: "first or last layer" for name in products[:1] + products[-1:]}
        packer = Packer(self.settings.numbers, Record(), ends | self.settings.spared)
        makers = MAKERS if self.settings.deterministic == "run" else MAKERS | NORMS
        with torch.no_grad():
            for name, layer in self.module.named_modules():
                make = makers.get(type(layer))
                if make is None:
                    if reason := _left_reason(layer):
                        record.add(name, "torch", reason)
                    continue
                try:
                    self._layers.append(Layer(name, layer, make(name, layer, packer), self._choose()))
                except UnsupportedError as error:
                    record.add(name, "torch", str(error))
        for name, layer in self.module.named_modules():
            stock = vars(layer).get("processor")
            if type(stock).__name__ in PROCESSORS:
                fused = PROCESSORS[type(stock).__name__](stock, self.settings.numbers.attention)
                self._processors.append((name, layer, fused))
        record.nbytes = packer.record.nbytes
        self._formats = {entry.name: entry for entry in packer.record.layers}

    @property
    def record(self) -> Record:
        """The layers with what they run as, as far as they have been called."""
        layers = [*self._left]
        for layer in self._layers:
            entry = self._formats.get(layer.name, LayerRecord(layer.name, "fused"))
            runs, reason = layer.outcome(entry)
            layers.append(LayerRecord(layer.name, runs, reason))
        layers += [LayerRecord(f"{name}.processor", *fused.outcome()) for name, _, fused in self._processors]
        layers += [LayerRecord(*entry) for entry in self._attention.outcomes()]
        return Record(layers, self._packed.nbytes)

    def install(self) -> None:
        """Puts our layers in place of the module's."""
        for layer in self._layers:
            layer.seat.take()
        for _, attention, fused in self._processors:
            attention.processor = fused

    def remove(self) -> None:
        """Gives every layer its own forward back."""
        for layer in self._layers:
            layer.seat.leave()
        for _, attention, fused in self._processors:
            if attention.processor is fused:  # else someone has put in another since
                attention.processor = fused.stock

    def __call__(self, *args, **kwargs):
        """The module's own forward over our layers and attention."""
        own = lambda: type(self.module).forward(self.module, *args, **kwargs)
        if torch.compiler.is_compiling():
            return own()
        self.calls["own forward over fused layers"] += 1
        if torch.is_grad_enabled() and self.module.training:
            return own()
        with self._attention:
            return own()


def _left_reason(layer: nn.Module) -> str:
    """Why a layer that computes stays torch's, or nothing for one that only holds others."""
    if type(layer) in NORMS:
        return "a norm by itself is no slower in torch"
    own = [p for p in layer._parameters.values() if p is not None]
    computes = any(p.dim() > 1 for p in own) and not isinstance(layer, nn.Embedding)
    return f"no kernel for {type(layer).__name__}" if computes else ""
