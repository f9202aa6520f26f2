"""`fuse_lora` of diffusers on quantized layers: the codes stay, and the adapter's product runs beside them.

peft would add it to the codes as if these were the weight. Here fusing costs no accuracy, and unfusing is exact.
"""

from types import MethodType

from torch import nn

from fastdiff.quant.layer import QLayer
from fastdiff.quant.linear import QLinear

_HELD = "_fuse_lora_apply"  # the method of a model that diffusers applies to all its modules


def keep_codes(model: nn.Module) -> None:
    """Lets a diffusers model fuse adapters into its quantized layers."""
    if hasattr(model, "fuse_lora"):
        model.__dict__[_HELD] = MethodType(_fuse_lora_apply, model)


def release(model: nn.Module) -> None:
    """Takes back what `keep_codes` did."""
    model.__dict__.pop(_HELD, None)


def _fuse_lora_apply(self, module, adapter_names=None):
    """Stands in for the model's own."""
    base = getattr(module, "base_layer", None)
    if not isinstance(base, QLayer):
        type(self)._fuse_lora_apply(self, module, adapter_names=adapter_names)
        return
    from peft.tuners.tuners_utils import check_adapters_to_merge

    if self.lora_scale != 1.0:
        module.scale_layer(self.lora_scale)
    for name in check_adapters_to_merge(module, adapter_names):
        if name not in module.lora_A:
            continue
        if not isinstance(base, QLinear) or name in module.lora_variant or module.lora_bias.get(name):
            raise ValueError(
                f"fuse_lora: {name!r} is more than a low-rank product on a linear layer, got {type(module).__name__}; "
                "leave it unfused on a quantized model"
            )
        base.add_lora(name, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
        module.merged_adapters.append(name)
        module.__dict__["unmerge"] = MethodType(_unmerge, module)


def _unmerge(self):
    """Stands in for the `unmerge` of peft's wrapper, once."""
    while self.merged_adapters:
        self.base_layer.remove_lora(self.merged_adapters.pop())
    del self.__dict__["unmerge"]
