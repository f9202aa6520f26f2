"""Layers of a module that is walked, each by itself on a fused kernel."""

from collections.abc import Callable

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.record import LayerRecord, UnsupportedError
from fastdiff.models.lower.seat import Seat
from fastdiff.models.lower.walk_choice import Always, Timed, servable, slower_reason

Tensor = torch.Tensor


class Layer:
    """One replaced layer: a callable that stands in for its forward."""

    def __init__(
        self, name: str, module: nn.Module, fused: Callable[[Tensor], Tensor], choice: Always | Timed
    ) -> None:
        self.name, self.module = name, module
        self._fused, self._choice = fused, choice
        self.seat = Seat(module, self)
        self._packed_from = self._parameters()

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        own = lambda: type(self.module).forward(self.module, x, *args, **kwargs)
        trains = self.module.training and torch.is_grad_enabled()
        if args or kwargs or trains or not servable(x) or self._parameters() != self._packed_from:
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
        if not self._choice.called:
            return entry.runs, "not called yet"
        slower = slower_reason(self._choice)
        return ("torch", slower) if slower else (entry.runs, entry.reason)


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


MAKERS = {nn.Linear: _linear, nn.Conv2d: _conv}
# by themselves slower than torch's: 0.25x and 0.4x on [77, 768] and [1, 256, 64, 64]; they pay where they are fused with more
NORMS = {nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm}
