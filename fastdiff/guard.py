"""The guard against NaN and Inf: finds the layer that made them, and does that layer again in float32."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.loop import NonFiniteError

Tensor = torch.Tensor


class Guarded:
    """Runs a module's forward, and looks at the result.

    Where it is not finite though the inputs are, the module's own forward runs with every submodule watched: the first one
    that makes NaN or Inf of finite inputs runs again in float32, its result clamped to what its dtype can hold.

    run     the forward that is guarded
    events  what happened, one sentence each
    """

    def __init__(self, module: nn.Module, run: Callable) -> None:
        self.module, self.run = module, run
        self.events: list[str] = []
        self._calls, self._busy = 0, False

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.run(*args, **kwargs)
        self._calls += 1
        out = self.run(*args, **kwargs)
        if _finite(out) or not _finite((args, kwargs)):
            return out
        where = f"call {self._calls}{_timestep(args, kwargs)}"
        found = len(self.events)
        out = self._watched(where, args, kwargs)
        if not _finite(out):
            raise NonFiniteError(f"guard: the result of {type(self.module).__name__} is not finite at {where}")
        if len(self.events) == found:
            self.events.append(f"{where}: the fused forward was not finite, the module's own is")
        return out

    def _watched(self, where: str, args: tuple, kwargs: dict):
        """The module's own forward, each submodule done again in float32 where that helps."""
        handles = [
            layer.register_forward_hook(self._hook(name or type(self.module).__name__, where), with_kwargs=True)
            for name, layer in self.module.named_modules()
            if layer is not self.module
        ]
        try:
            out = type(self.module).forward(self.module, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return out

    def _hook(self, name: str, where: str) -> Callable:
        def look(layer: nn.Module, args: tuple, kwargs: dict, out: object) -> object:
            if self._busy or _finite(out) or not _finite((args, kwargs)):
                return None
            again = self._in_float32(layer, args, kwargs)
            if not _finite(again):
                raise NonFiniteError(f"guard: {name} makes NaN or Inf of finite inputs at {where}, in float32 as well")
            self.events.append(f"{where}: {name} overflowed in {_dtype(out)}, done again in float32")
            return tree_map(_fit, again, out)

        return look

    def _in_float32(self, layer: nn.Module, args: tuple, kwargs: dict) -> object:
        parameters = {name: _widen(p) for name, p in (*layer.named_parameters(), *layer.named_buffers())}
        self._busy = True
        try:
            return torch.func.functional_call(layer, parameters, tree_map(_widen, args), tree_map(_widen, kwargs))
        finally:
            self._busy = False


def _floats(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _finite(values: object) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in _floats(values))


def _widen(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _fit(value: object, like: object) -> object:
    """A float32 result in the dtype of the layer's, inside its finite range."""
    if not isinstance(value, Tensor) or value.dtype == like.dtype:
        return value
    limits = torch.finfo(like.dtype)
    return value.clamp(limits.min, limits.max).to(like.dtype)


def _dtype(values: object) -> str:
    return ", ".join({str(leaf.dtype).removeprefix("torch.") for leaf in _floats(values)})


def _timestep(args: tuple, kwargs: dict) -> str:
    """The timestep of a denoiser's call, which tells the step of a sampler apart."""
    for name in ("timestep", "timesteps", "t"):
        if name in kwargs:
            break
    else:
        return ""
    value = kwargs[name]
    value = value.flatten()[0].item() if isinstance(value, Tensor) and value.numel() else value
    return f", timestep {value:g}"
