"""Finds the convolutions that read a concatenated input, so that its two parts can have ranges of their own."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastdiff.quant import observe
from fastdiff.quant.calibration import CalibrationSet

# functions that leave every channel where it is; group norm mixes statistics, not positions
_KEEPING = {
    F.silu,
    F.group_norm,
    F.relu,
    F.gelu,
    F.dropout,
    torch.Tensor.contiguous,
    torch.Tensor.to,
    torch.Tensor.float,
}
_ATTRIBUTE = "_fastdiff_first_part"


class _Tracing(TorchFunctionMode):
    """Marks the results of concatenation with the channels of their first part, and follows them."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat):
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            if len(args[0]) == 2 and out.dim() == 4 and dim in (1, -3):
                setattr(out, _ATTRIBUTE, args[0][0].shape[1])
        elif func in _KEEPING and hasattr(args[0], _ATTRIBUTE):
            setattr(out, _ATTRIBUTE, getattr(args[0], _ATTRIBUTE))
        return out


def find_shortcuts(net: nn.Module, data: CalibrationSet) -> dict[str, int]:
    """Name of every convolution whose input is a concatenation of two tensors -> channels of the first."""
    found: dict[str, int] = {}

    def see(name: str, x: torch.Tensor) -> None:
        if hasattr(x, _ATTRIBUTE):
            found[name] = getattr(x, _ATTRIBUTE)

    convs = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    one = CalibrationSet(*data.rows(slice(0, 1)))
    with observe.watching(net, {name: lambda x, name=name: see(name, x) for name in convs}), _Tracing():
        observe.run(net, one)
    return found
