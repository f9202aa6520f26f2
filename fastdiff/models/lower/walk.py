"""Any other module: its linear layers, convolutions, norms and attention are replaced one by one where that pays."""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastdiff import ops
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.record import LayerRecord, Mode, Record, UnsupportedError

Tensor = torch.Tensor
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDS = 5  # of each contender, when a layer is timed


class Walked:
    """A module some of whose layers run on fused kernels.

    Each layer is timed against the module's own at its first call, on the real input, and keeps the faster.
    """

    def __init__(
        self, module: nn.Module, mode: Mode, spared: dict[str, str], keep_original: bool, reason: str
    ) -> None:
        if not keep_original:
            raise ValueError(
                f"accelerate: keep_original=False needs a lowered family, and {type(module).__name__} is not one: {reason}"
            )
        self.module, self.mode, self.spared = module, mode, spared
        self.name, self.set_up_s, self.keeps_original = "", 0.0, True
        self.calls: Counter[str] = Counter()
        self._attention = _Attention(mode.attention)
        self._layers: list[_Layer] = []
        self._pack(reason)

    def _pack(self, reason: str) -> None:
        record = self._packed = Record()
        record.add(type(self.module).__name__, "its own forward", reason)
        self._left: list[LayerRecord] = record.layers
        products = [name for name, layer in self.module.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]
        ends = {name: "first or last layer" for name in products[:1] + products[-1:]}
        packer = Packer(self.mode, Record(), ends | self.spared)
        with torch.no_grad():
            for name, layer in self.module.named_modules():
                make = _MAKERS.get(type(layer))
                if make is None:
                    continue
                try:
                    self._layers.append(_Layer(name, layer, make(name, layer, packer)))
                except UnsupportedError as error:
                    record.add(name, "torch", str(error))
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
        layers += [LayerRecord(*entry) for entry in self._attention.outcomes()]
        return Record(layers, self._packed.nbytes)

    def install(self) -> None:
        """Puts our forwards in place of the layers' and the module's own."""
        for layer in self._layers:
            layer.module.__dict__["forward"] = layer
        self.module.__dict__["forward"] = self.forward

    def remove(self) -> None:
        """Gives every layer its own forward back."""
        for module in (self.module, *(layer.module for layer in self._layers)):
            module.__dict__.pop("forward", None)

    def forward(self, *args, **kwargs):
        """The module's own forward, with attention and layers replaced where that pays."""
        self.calls["own forward over fused layers"] += 1
        if torch.compiler.is_compiling() or torch.is_grad_enabled() and self.module.training:
            return type(self.module).forward(self.module, *args, **kwargs)
        with self._attention:
            return type(self.module).forward(self.module, *args, **kwargs)


class _Choice:
    """Which of two ways to compute the same thing is faster, found on the first input of each shape."""

    def __init__(self) -> None:
        self._ours: dict[tuple, bool] = {}
        self.ratios: list[float] = []

    def is_ours(self, key: tuple, ours: Callable[[], Tensor], own: Callable[[], Tensor]) -> bool:
        if key not in self._ours:
            seconds = {run: [] for run in (ours, own)}
            for run in (ours, own) * _ROUNDS:
                start = time.perf_counter()
                run()
                seconds[run].append(time.perf_counter() - start)
            ratio = min(seconds[own]) / min(seconds[ours])
            self.ratios.append(ratio)
            self._ours[key] = ratio > 1
        return self._ours[key]


class _Layer:
    """One replaced layer: a callable that stands in for its forward."""

    def __init__(self, name: str, module: nn.Module, fused: Callable[[Tensor], Tensor]) -> None:
        self.name, self.module = name, module
        self._fused = fused
        self._packed_from = self._parameters()
        self._choice = _Choice()

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        own = lambda: type(self.module).forward(self.module, x, *args, **kwargs)
        if args or kwargs or not _servable(x) or self._parameters() != self._packed_from:
            return own()
        ours = lambda: self._fused(x)
        return ours() if self._choice.is_ours((x.shape, x.stride(), x.dtype), ours, own) else own()

    def _parameters(self) -> list[tuple]:
        """Tells parameters that were written to, or replaced, from those that were packed."""
        held = [p for p in self.module._parameters.values() if p is not None]
        return [(id(p), p.data_ptr(), None if p.is_inference() else p._version) for p in held]

    def outcome(self, entry: LayerRecord) -> tuple[str, str]:
        if self._parameters() != self._packed_from:
            return "torch", "its weights have changed; accelerate again"
        if not self._choice.ratios:
            return entry.runs, "not called yet"
        worst = min(self._choice.ratios)
        return (entry.runs, entry.reason) if worst > 1 else ("torch", f"ours takes {1 / worst:.2f}x the time")


def _servable(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or any(t.device.type != "cpu" or t.dtype not in _FLOATS for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) and all(t.numel() for t in tensors)


class _Attention(TorchFunctionMode):
    """Serves F.scaled_dot_product_attention inside the module, whoever calls it."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self._precision = precision
        self._choices: dict[tuple, _Choice] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        own = lambda: func(*args, **kwargs)
        ours = self._ours(*args, **kwargs)
        if ours is None:
            return own()
        key = tuple(args[0].shape), tuple(args[1].shape)
        return ours() if self._choices.setdefault(key, _Choice()).is_ours(key, ours, own) else own()

    def _ours(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        plain = dropout_p == 0.0 and not is_causal and query.dim() == 4 and value.shape == key.shape
        grouped = enable_gqa or query.shape[-3] == key.shape[-3]
        if not plain or not grouped or not _servable(query, key, value) or query.stride(-1) != 1:
            return None
        heads_last = lambda t: t.transpose(1, 2)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = heads_last(query), heads_last(key), heads_last(value)
        return lambda: heads_last(ops.attention(q, k, v, attn_mask, None, scale, self._precision))

    def outcomes(self) -> Iterator[tuple[str, str, str]]:
        for (query, key), choice in self._choices.items():
            ratio = min(choice.ratios)
            runs = f"attention {self._precision}" if ratio > 1 else "torch"
            reason = "" if ratio > 1 else f"ours takes {1 / ratio:.2f}x the time"
            yield f"scaled_dot_product_attention {list(query)} x {list(key)}", runs, reason


def _linear(name: str, layer: nn.Linear, packer: Packer) -> Callable[[Tensor], Tensor]:
    packed = packer.linear(name, layer)
    return lambda x: packed(x if x.is_contiguous() else x.contiguous(), out_dtype=x.dtype)


def _conv(name: str, layer: nn.Conv2d, packer: Packer) -> Callable[[Tensor], Tensor]:
    square = len(set(layer.kernel_size)) == len(set(layer.stride)) == 1 and not isinstance(layer.padding, str)
    if not square or layer.groups != 1 or set(layer.dilation) != {1} or layer.padding_mode != "zeros":
        raise UnsupportedError("groups, dilation, or kernels that are not square")
    packed = packer.conv(name, layer)

    def run(x: Tensor) -> Tensor:
        last = x.permute(0, 2, 3, 1)
        return packed(last if last.is_contiguous() else ops.copy(last, x.dtype), out_dtype=x.dtype).permute(0, 3, 1, 2)

    return run


def _group_norm(name: str, layer: nn.GroupNorm, packer: Packer) -> Callable[[Tensor], Tensor]:
    affine = (layer.num_groups, layer.weight, layer.bias, layer.eps, "none", None, None, None)

    def run(x: Tensor) -> Tensor:
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return ops.group_norm(x.permute(0, 2, 3, 1), None, *affine, x.dtype).permute(0, 3, 1, 2)
        return ops.group_norm_nchw(x.contiguous(), *affine, x.dtype)

    return run


def _layer_norm(name: str, layer: nn.LayerNorm, packer: Packer) -> Callable[[Tensor], Tensor]:
    if len(layer.normalized_shape) != 1:
        raise UnsupportedError("norm over several dimensions")

    def run(x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, x.shape[-1])
        return ops.norm_modulate(rows, "layer", layer.weight, layer.bias, layer.eps, None, None, x.dtype).view(x.shape)

    return run


_MAKERS = {nn.Linear: _linear, nn.Conv2d: _conv, nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm}
