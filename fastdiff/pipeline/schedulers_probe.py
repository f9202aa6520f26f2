"""One step of a diffusers scheduler, run on basis vectors: what it computes, as weights of what it was given."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fastdiff.ops.solver_step import MAX_SLOTS

HIDDEN = 3  # results of earlier calls that may exist as a relation only
# what a result may depend on: the sample, the model's output, fresh noise, the clamped prediction, slots, hidden results
SAMPLE, OUTPUT, NOISE, CLAMPED = range(4)
SLOT, DEAD = 4, 4 + MAX_SLOTS
SYMBOLS = DEAD + HIDDEN
ONE = SYMBOLS  # the constant term of a vector
_CHECKS = 24
SIZE = SYMBOLS + 1 + _CHECKS
_AFFINE, _ZERO = 1e-6, 1e-11
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
_CLAMPS = {"clamp", "clip", "clamp_", "clip_"}
_DRAWS = {"randn", "randn_like"}
_RANDOM = set("rand rand_like randint randperm normal normal_ uniform_ bernoulli multinomial exponential_".split())
_WATCHED = _CASTS | _CLAMPS | _DRAWS | _RANDOM


class NotAffineError(ValueError):
    """This step cannot be executed as one row."""


def _values() -> np.ndarray:
    """[symbol, element]: 1 in the element of the same number, 0 in the others and in the next, then random numbers."""
    random = np.random.default_rng(0).standard_normal((SYMBOLS, _CHECKS))
    return np.concatenate([np.eye(SYMBOLS), np.zeros((SYMBOLS, 1)), random], axis=1)


_VALUES = _values()


class Ref(NamedTuple):
    """A tensor of a scheduler's state: `scale` times a history slot, or a hidden result."""

    slot: int = -1
    dead: int = -1
    scale: float = 1.0


@dataclass(eq=False)
class Response:
    """What a step did. A vector has a weight per symbol and a constant.

    outputs  result name or place -> vector, or what was returned instead of a tensor
    kind     the class of the result, or None for a tuple
    tensors  changed attributes that hold tensors like the sample, with vectors in their places
    plain    other changed attributes
    clamp    (vector, low, high) of the one clamped prediction
    draws    whether noise was drawn
    """

    outputs: dict[str | int, object]
    kind: type | None
    tensors: dict[str, object] = field(default_factory=dict)
    plain: dict[str, object] = field(default_factory=dict)
    clamp: tuple[np.ndarray, float, float] | None = None
    draws: bool = False


class _Watch(TorchFunctionMode):
    """Follows a step: gives noise, keeps sums in float64, and takes a clamp apart."""

    def __init__(self, dim: int):
        super().__init__()
        self.shape = torch.Size([1] * (dim - 1) + [SIZE])
        self.clamped, self.draws = [], 0

    def symbol(self, k: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(scale * _VALUES[k]).reshape(self.shape)

    def is_symbolic(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self.shape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in _WATCHED:
            return func(*args, **kwargs) if kwargs else func(*args)
        if name in _DRAWS:
            self.draws += 1
            return self.symbol(NOISE)
        if name in _RANDOM:
            raise NotAffineError(f"it draws with torch.{name}")
        if self.is_symbolic(args[0]):
            return args[0] if name in _CASTS else self._clamp(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _clamp(self, value, min=None, max=None):
        low, high = (float(edge) if edge is not None else end for edge, end in ((min, -np.inf), (max, np.inf)))
        self.clamped.append((value.clone(), low, high))
        return self.symbol(CLAMPED)

    def vector(self, tensor: torch.Tensor) -> np.ndarray:
        """The weights of a result, and its constant. Raises NotAffineError where there are none."""
        got = tensor.double().reshape(-1).numpy()
        one = got[SYMBOLS]
        weights = got[:SYMBOLS] - one
        wanted = one + weights @ _VALUES[:, SYMBOLS + 1 :]
        scale = max(np.abs(weights).max(), abs(one), 1e-30)
        if not np.max(np.abs(got[SYMBOLS + 1 :] - wanted)) <= _AFFINE * scale:
            raise NotAffineError("a result is not an affine function of the sample, the output, noise and history")
        weights[np.abs(weights) < _ZERO * scale] = 0.0
        return np.append(weights, one)

    def read(self, value: object) -> object:
        """`value` with vectors in the places of tensors."""
        if self.is_symbolic(value):
            return self.vector(value)
        return type(value)(self.read(v) for v in value) if isinstance(value, (list, tuple)) else value


def probe(
    cls: type, state: Mapping[str, object], timestep: object, options: Mapping[str, object], dim: int
) -> Response:
    """What `cls.step` computes in this state. The state's tensors on the CPU, those like the sample as `Ref`.

    Raises NotAffineError, or whatever the step raises.
    """
    watch, twin, result = _run(cls, state, timestep, options, dim)
    response = _response(watch, result)
    if len(watch.clamped) > 1 or watch.draws > 1:
        raise NotAffineError(
            f"it clamps {len(watch.clamped)} times and draws noise {watch.draws} times; once is possible"
        )
    response.draws = watch.draws == 1
    if watch.clamped:
        value, low, high = watch.clamped[0]
        response.clamp = watch.vector(value), low, high
    for name, value in vars(twin).items():
        _note_change(watch, response, name, state.get(name, _ABSENT), value)
    return response


_ABSENT = object()


def _run(cls, state, timestep, options, dim):
    watch = _Watch(dim)
    twin = object.__new__(cls)
    vars(twin).update({name: fill(value, lambda ref: _symbol(watch, ref)) for name, value in state.items()})
    with torch.no_grad(), watch:
        noise = {"variance_noise": watch.symbol(NOISE)} if options.get("variance_noise") else {}
        result = cls.step(twin, watch.symbol(OUTPUT), timestep, watch.symbol(SAMPLE), **{**options, **noise})
    return watch, twin, result


def fill(value: object, make) -> object:
    """`value` with `make(ref)` in the places of references; lists are new."""
    if isinstance(value, Ref):
        return make(value)
    return [fill(v, make) for v in value] if isinstance(value, list) else value


def _symbol(watch: _Watch, ref: Ref) -> torch.Tensor:
    return watch.symbol(SLOT + ref.slot if ref.slot >= 0 else DEAD + ref.dead, ref.scale)


def _response(watch: _Watch, result: object) -> Response:
    kind = None if isinstance(result, tuple) else type(result)
    pairs = enumerate(result) if kind is None else result.items() if hasattr(result, "items") else ()
    outputs = {name: watch.read(value) for name, value in pairs}
    if kind is not None:  # fields that are None are no items
        outputs = {name: outputs.get(name) for name in inspect.signature(kind).parameters}
    if not outputs or not isinstance(next(iter(outputs.values())), np.ndarray):
        raise NotAffineError("its first result is not a tensor like the sample")
    if any(isinstance(value, torch.Tensor) for value in outputs.values()):
        raise NotAffineError("it returns a tensor unlike the sample")
    return Response(outputs, kind)


def _note_change(watch: _Watch, response: Response, name: str, before: object, after: object) -> None:
    if isinstance(after, torch.Size):
        raise NotAffineError(f"it remembers the sample's size in {name}")
    values = after if isinstance(after, (list, tuple)) else [after]
    if any(watch.is_symbolic(value) for value in values):
        response.tensors[name] = watch.read(after)
    elif not _same(before, after):
        response.plain[name] = after


def _same(before: object, after: object) -> bool:
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_same, before, after))
    if before is after:
        return True
    simple = (int, float, bool, str)
    return isinstance(before, simple) and type(before) is type(after) and before == after
