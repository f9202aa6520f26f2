"""LoRA (Hu et al. 2021) on layers that are packed: peft's low-rank branches are added to the weights while packing.

Quantized layers keep their codes; there the branches run beside them.
"""

import copy
from collections.abc import Iterable

from torch import nn

from fastdiff.models.lower.record import UnsupportedError


def is_adapted(layer: nn.Module) -> bool:
    """Whether this is peft's wrapper around a layer, with low-rank branches."""
    return hasattr(layer, "base_layer") and hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A")


def merged(name: str, layer: nn.Module) -> nn.Module:
    """The layer itself, or, of one with active adapters, a plain layer that computes the same.

    Raises UnsupportedError for adapters that are more than a product of two matrices (DoRA, a bias).
    """
    if not is_adapted(layer):
        return layer
    if layer.disable_adapters and layer.merged_adapters:
        raise UnsupportedError(f"{name}: its adapter is disabled while it is fused")
    off = layer.disable_adapters or layer.merged_adapters
    active = [] if off else [a for a in layer.active_adapters if a in layer.lora_A]
    if any(a in layer.lora_variant or layer.lora_bias.get(a) for a in active):
        raise UnsupportedError(f"{name}: its adapter is more than a low-rank product")
    base = layer.base_layer
    if not active:
        return base
    if hasattr(base, "with_lora"):
        return base.with_lora({a: (layer.lora_A[a].weight, layer.lora_B[a].weight, layer.scaling[a]) for a in active})
    weight = base.weight.detach().float() + sum(layer.get_delta_weight(a).detach().float() for a in active)
    plain = copy.copy(base)
    plain._parameters = dict(base._parameters, weight=nn.Parameter(weight, requires_grad=False))
    return plain


def adapter_state(layers: Iterable[nn.Module]) -> list[tuple]:
    """What decides, besides parameters, how adapted layers compute: which adapters are active, how strong, fused or off."""
    return [
        (tuple(l.active_adapters), tuple(l.scaling.items()), tuple(l.merged_adapters), l.disable_adapters)
        for l in layers
    ]
