"""How a run is executed, apart from what it computes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten

from fastdiff.carry import Hook


@dataclass(frozen=True)
class RunOptions:
    """Execution settings of `Sampler.step`, checked."""

    aux: object = None
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    hooks: tuple[Hook, ...] = ()
    guard: bool = True
    graph: bool = False
    micro_batch: int | None = None
    model_dtype: torch.dtype | None = None

    def __post_init__(self):
        if not isinstance(self.hooks, (list, tuple)) or not all(isinstance(hook, Hook) for hook in self.hooks):
            raise TypeError(f"hooks: a list of fastdiff.Hook objects expected, got {self.hooks!r}")
        object.__setattr__(self, "hooks", tuple(self.hooks))
        if self.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: the state is float32 or float64, got {self.dtype}; the model may have any")
        if self.graph and self.hooks:
            raise ValueError("graph: hooks run between the parts of a step; sample without graph or without hooks")

    def resolve_device(self, net: Callable, x: object) -> torch.device:
        """The device of the run: the given one, else that of x, else that of the network, else the CPU."""
        if self.device is not None:
            device = _device(self.device)
            if device.type not in ("cpu", "cuda"):
                raise ValueError(f"device: must be cpu or cuda, got {str(device)!r}")
            if device.type == "cuda" and not torch.cuda.is_available():
                raise RuntimeError("device: cuda was asked for, but torch sees no CUDA GPU; use device='cpu'")
            return device
        found = tree_flatten(x)[0] if x is not None else _parameters(net)
        return next((leaf.device for leaf in found if isinstance(leaf, torch.Tensor)), torch.device("cpu"))

    def resolve_model_dtype(self, net: Callable) -> torch.dtype:
        """The dtype of the network's input: the given one, else that of its first floating parameter, else the state's."""
        if self.model_dtype is not None:
            return self.model_dtype
        return next((p.dtype for p in _parameters(net) if p.dtype.is_floating_point), self.dtype)


def _device(device: object) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: must be cpu or cuda, got {device!r}") from None


def check_model_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype itself. Raises TypeError where a network's input cannot have it."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"model_dtype: must be a float dtype of torch or None, got {dtype!r}")
    return dtype


def _parameters(net: Callable) -> Iterator[torch.Tensor]:
    return net.parameters() if isinstance(net, torch.nn.Module) else iter(())
