"""A private copy of a scheduler object that computes in float64 and draws its noise where we say."""

import copy
import types
from collections.abc import Callable, Mapping

import numpy as np
import torch

_WIDER_TORCH = {"float32": torch.float64, "float": torch.float64}
_WIDER_NUMPY = {"float32": np.float64}


class _Module:
    """A module seen through a few replaced names."""

    def __init__(self, module: types.ModuleType, replaced: Mapping[str, object]):
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str):
        return self._replaced[name] if name in self._replaced else getattr(self._module, name)


def float64_twin(scheduler: object, draw: Callable[[tuple[int, ...]], torch.Tensor], wide: bool = True) -> object:
    """A deep copy of `scheduler` whose methods use float64 for float32, and `draw(shape)` for every noise tensor.

    Its class is made for it: the methods are those of the scheduler's classes with other globals, so neither the given
    object nor its class or module changes, and several threads may do this at once. Operations that insist on float32
    (a `.float()` call) stay as they are. With `wide` false only the noise is replaced.
    """
    twin = copy.deepcopy(scheduler)
    for name, value in vars(twin).items() if wide else ():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            vars(twin)[name] = value.double()
    sources = _sources(draw, wide)
    seen: dict[int, dict] = {}
    body: dict[str, object] = {}
    for cls in reversed(type(scheduler).__mro__[:-1]):
        body.update({name: _moved(value, sources, seen) for name, value in vars(cls).items() if name not in _KEPT})
    twin.__class__ = type(type(scheduler).__name__, (type(scheduler),), body)
    return twin


def _sources(draw: Callable, wide: bool) -> dict[str, object]:
    """What stands for the names torch, numpy and randn_tensor."""
    like = lambda tensor, *args, **kwargs: draw(tuple(tensor.shape))
    sized = lambda *shape, **kwargs: draw(tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape)
    noise = {"randn": sized, "randn_like": like, "normal": _refuse_normal}
    return {
        "torch": _Module(torch, {**noise, **(_WIDER_TORCH if wide else {})}),
        "numpy": _Module(np, _WIDER_NUMPY if wide else {}),
        "randn_tensor": lambda shape, *args, **kwargs: draw(tuple(shape)),
    }


_KEPT = {"__dict__", "__weakref__", "__doc__", "__module__", "__init__", "__slots__", "__getattr__", "__class__"}


def _moved(value: object, sources: Mapping[str, object], seen: dict[int, dict]) -> object:
    """A function, property or static or class method of a class, with replaced globals; anything else unchanged."""
    if isinstance(value, types.FunctionType):
        return _with_globals(value, _globals(value, sources, seen))
    if isinstance(value, property):
        return property(*(f and _moved(f, sources, seen) for f in (value.fget, value.fset, value.fdel)))
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_moved(value.__func__, sources, seen))
    return value


def _globals(function: types.FunctionType, sources: Mapping[str, object], seen: dict[int, dict]) -> dict:
    """The function's globals with torch, numpy and the noise sources replaced, shared by all functions of a module."""
    key = id(function.__globals__)
    if key in seen:
        return seen[key]
    made = seen[key] = dict(function.__globals__)
    for name, value in function.__globals__.items():
        if value is torch:
            made[name] = sources["torch"]
        elif value is np:
            made[name] = sources["numpy"]
        elif name == "randn_tensor":
            made[name] = sources["randn_tensor"]
        elif isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
            made[name] = _with_globals(value, made)
    return made


def _refuse_normal(*args, **kwargs):
    raise ValueError("it draws noise with torch.normal, which cannot be followed")


def _with_globals(function: types.FunctionType, scope: dict) -> types.FunctionType:
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    return made
