"""Block reconstruction: learns the rounding of all layers of a block so that the block's output stays (BRECQ, TFMQ-DM)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.quant.adaround import LearnedRounding, learn
from fastdiff.quant.conv import QConv2d, QSplit, as_images, as_matrix
from fastdiff.quant.hadamard import rotate
from fastdiff.quant.layer import QLayer
from fastdiff.quant.plan import set_module
from fastdiff.quant.schemes import Rounding

Tensor = torch.Tensor


class SoftLayer(nn.Module):
    """A quantized layer while its rounding is learned; activations are not quantized.

    weight  [N, K] in the layer's coordinates, from which its codes were rounded
    """

    def __init__(self, layer: QLayer, weight: Tensor) -> None:
        super().__init__()
        made = layer.codes()
        self.layer = [layer]  # in a list: not a submodule, its buffers are not trained
        self.rounding = LearnedRounding(weight, made.scale, made.zero, made.spec)
        if isinstance(layer, QConv2d):  # blocks ask their convolutions for it
            self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.layer[0], self.rounding.soft()
        if isinstance(layer, QConv2d):
            weight = as_images(weight, layer.kernel_size)
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        y = F.linear(layer.transformed(x), weight, layer.bias)
        if layer.lowrank_up is None:
            return y
        smoothed = x if layer.smooth is None else x / layer.smooth
        return y + F.linear(F.linear(smoothed, layer.lowrank_down), layer.lowrank_up)


def soften(net: nn.Module, weights: dict[str, Tensor]) -> dict[str, SoftLayer]:
    """Puts a SoftLayer in the place of every named QLayer; `weights` are their unrounded weights."""
    soft = {name: SoftLayer(net.get_submodule(name), weight) for name, weight in weights.items()}
    for name, module in soft.items():
        set_module(net, name, module)
    return soft


def harden(net: nn.Module, soft: dict[str, SoftLayer], nearest: bool = False) -> None:
    """Puts the layers back, with the learned codes, or with the nearest ones."""
    for name, module in soft.items():
        layer = module.layer[0]
        layer.set_codes(module.rounding.codes(nearest))
        set_module(net, name, layer)


def reconstruct(
    net: nn.Module, weights: dict[str, Tensor], forward: Callable[[Tensor], Tensor], target: Tensor, settings: Rounding
) -> tuple[float, float]:
    """Learns the rounding of the named layers so that forward(rows) matches target[rows]; returns the two losses.

    forward  runs the part of the network that holds the layers on the calibration samples `rows`
    returns  loss with the nearest codes and with those that were kept: the learned ones unless they are worse
    """
    samples = target.shape[0]
    everything = torch.arange(samples).split(settings.batch)

    def loss_of_codes() -> float:
        with torch.no_grad():
            return sum(float(_loss(forward(rows), target[rows])) * len(rows) for rows in everything) / samples

    nearest = loss_of_codes()
    soft = soften(net, weights)
    try:
        with torch.enable_grad():
            learned = [module.rounding for module in soft.values()]
            learn(learned, lambda rows: _loss(forward(rows), target[rows]), samples, settings)
    finally:
        harden(net, soft)
    found = loss_of_codes()
    if found <= nearest:
        return nearest, found
    harden(net, soft, nearest=True)
    return nearest, nearest


def unrounded(layer: nn.Module, original: Tensor) -> Tensor:
    """The weight [N, K] that a QLayer's codes were rounded from; `original` is that of the floating-point layer."""
    if isinstance(layer, QConv2d):
        return as_matrix(original.detach().float())
    weight = original.detach().float()
    weight = weight if layer.smooth is None else weight * layer.smooth
    if layer.lowrank_up is not None:
        weight = weight - layer.lowrank_up @ layer.lowrank_down
    return rotate(weight, layer.rotation)


def learnable(name: str, quantized: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """Name and unrounded weight of the QLayers inside a quantized layer: one, or the two parts of a split one."""
    if not isinstance(quantized, QSplit):
        return {name: unrounded(quantized, original.weight)}
    cut = quantized.channels
    parts = {"first": original.weight[:, :cut], "second": original.weight[:, cut:]}
    return {f"{name}.{key}": unrounded(getattr(quantized, key), part) for key, part in parts.items()}


def _loss(out: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over channels, averaged over the rest."""
    channels = 1 if out.dim() == 4 else -1
    return (out - target).square().sum(channels).mean()
