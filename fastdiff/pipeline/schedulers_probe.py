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
_AFFINE, _STABLE, _ZERO = 1e-6, 2e-4, 1e-11
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
_CLAMPS = {"clamp", "clip", "clamp_", "clip_"}
_DRAWS = {"randn", "randn_like"}
_RANDOM = set("rand rand_like randint randperm normal normal_ uniform_ bernoulli multinomial exponential_".split())


class NotAffineError(ValueError):
    """This step cannot be executed as one row."""


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
    """Follows a step: gives noise, keeps precision, and takes a clamp apart. `exact` computes in float64."""

    def __init__(self, dim: int, exact: bool):
        super().__init__()
        self.shape = torch.Size([1] * (dim - 1) + [SIZE])
        self.exact, self.dtype = exact, torch.float64 if exact else torch.float32
        random = np.random.default_rng(0)
        self.values = np.zeros((SYMBOLS, SIZE))
        self.values[:, :SYMBOLS] = np.eye(SYMBOLS)
        self.values[:, SYMBOLS + 1 :] = random.standard_normal((SYMBOLS, _CHECKS))
        self.clamped, self.draws = [], 0

    def symbol(self, k: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(scale * self.values[k]).to(self.dtype).reshape(self.shape)

    def is_symbolic(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self.shape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _DRAWS:
            self.draws += 1
            return self.symbol(NOISE)
        if name in _RANDOM:
            raise NotAffineError(f"it draws with torch.{name}")
        if args and self.is_symbolic(args[0]):
            if name in _CASTS:
                return args[0]
            if name in _CLAMPS:
                return self._clamp(*args, **kwargs)
        return func(*args, **kwargs)

    def _clamp(self, value, min=None, max=None):
        low, high = (float(edge) if edge is not None else end for edge, end in ((min, -np.inf), (max, np.inf)))
        self.clamped.append((value.clone(), low, high))
        return self.symbol(CLAMPED)

    def vector(self, tensor: torch.Tensor) -> np.ndarray:
        """The weights of a result, and its constant. Raises NotAffineError where there are none."""
        got = tensor.double().reshape(-1).numpy()
        one = got[SYMBOLS]
        weights = got[:SYMBOLS] - one
        wanted = one + weights @ self.values[:, SYMBOLS + 1 :]
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

    Runs twice: with exact sums, for the weights, and in float32: where that is far off, rounding decides what the scheduler
    returns, and only its own step returns the same. Raises NotAffineError, or whatever the step raises.
    """
    watch, twin, result = _run(cls, state, timestep, options, dim, exact=True)
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
    _check_rounding(result, _run(cls, state, timestep, options, dim, exact=False)[2])
    return response


_ABSENT = object()


def _run(cls, state, timestep, options, dim, exact):
    watch = _Watch(dim, exact)
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


def _check_rounding(exact: object, rounded: object) -> None:
    first = [next(iter(r.values())) if hasattr(r, "values") else r[0] for r in (exact, rounded)]
    a, b = (t.double().reshape(-1)[SYMBOLS + 1 :] for t in first)
    off = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    if not off <= _STABLE:
        raise NotAffineError(f"its own float32 rounding changes this result by {off:.0e}")
