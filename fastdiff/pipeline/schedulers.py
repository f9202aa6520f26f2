"""Diffusers' schedulers with their steps on the fused kernel: subclasses of the same name that save and load as the originals."""

import functools
import inspect
from collections.abc import Callable, Sequence

from fastdiff.pipeline.schedulers_report import SchedulerReport, is_vector
from fastdiff.pipeline.schedulers_runner import Runner
from fastdiff.pipeline.schedulers_state import PRIVATE, is_same, own

_LEADING = ("model_output", "timestep", "sample")
_CLASSES: dict[type, type] = {}


def as_fast(scheduler: object, *, noise: str = "torch", seed: int | Sequence[int] = 0, strict: bool = False) -> object:
    """A copy of a diffusers scheduler that does its steps on the fused kernel; `scheduler` itself is left alone.

    noise  "torch": drawn from torch's generators exactly as the scheduler draws it; "philox": counter-based, made in the kernel,
           a function of (seed, step, element) and of nothing else
    seed   Philox seeds of the samples where `step` gets no generator: a list, or the first of consecutive numbers
    strict raise RuntimeError in `step` where the kernel cannot do it

    The copy is an instance of the scheduler's class, has its class name, module and config, and saves as the original.
    `step` also takes one timestep per sample. A step that the kernel cannot do is done by the scheduler's own code;
    `fastdiff_report()` says how many and why. Raises TypeError for an object that has no `step`.
    """
    if noise not in ("torch", "philox"):
        raise ValueError(f"as_fast: noise must be 'torch' or 'philox', got {noise!r}")
    state = scheduler.__getstate__() if isinstance(scheduler, _Fast) else dict(vars(scheduler))
    philox = None if noise == "torch" else seed if isinstance(seed, int) else tuple(seed)
    fast = _rebuild(stock_class(type(scheduler)), philox, strict)
    vars(fast).update({name: own(value) for name, value in state.items()})
    return fast


def fast_class(stock: type) -> type:
    """The subclass of a diffusers scheduler class whose steps run on the fused kernel."""
    stock = stock_class(stock)
    if stock not in _CLASSES:
        if not callable(getattr(stock, "step", None)):
            raise TypeError(f"as_fast: {stock.__name__} has no step(); use it as it is")
        names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
        own = {**names, "step": _step_like(stock), "_fastdiff_stock": stock}
        if hasattr(stock, "scale_model_input"):
            own["scale_model_input"] = _scale_like(stock)
        _CLASSES[stock] = type(stock.__name__, (_Fast, stock), own)
    return _CLASSES[stock]


def stock_class(cls: type) -> type:
    """Diffusers' own class of a scheduler class."""
    return getattr(cls, "_fastdiff_stock", cls)


class _Fast:
    """What fast schedulers have beside their class. Everything that is not a step is the class's own."""

    def fastdiff_report(self) -> SchedulerReport:
        """How many steps ran on the kernel, and how many did not and why."""
        return _runner(self).report

    def __setattr__(self, name: str, value: object) -> None:
        attributes = self.__dict__
        runner = attributes.get(PRIVATE)
        if runner is not None and not (name in attributes and is_same(attributes[name], value)):
            runner.dirty = True
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> object:
        runner = self.__dict__.get(PRIVATE)
        if runner is not None and runner.restore(self.__dict__, name):
            return self.__dict__[name]
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, object]:
        _runner(self).restore(self.__dict__)
        return {name: value for name, value in self.__dict__.items() if name != PRIVATE}

    def __reduce_ex__(self, protocol: int) -> tuple:
        runner = _runner(self)
        return _rebuild, (runner.stock, runner.philox, runner.strict), self.__getstate__()


def _step_like(stock: type) -> Callable:
    """`step` with the signature of the class's own."""
    parameters = tuple(inspect.signature(stock.step).parameters)[1:]
    if parameters[:3] != _LEADING:

        @functools.wraps(stock.step)
        def step(self, *args, **options):
            _runner(self).leave(f"{stock.__name__}.step takes {', '.join(parameters[:3])}")
            return stock.step(self, *args, **options)

        return step
    rest = parameters[3:]

    @functools.wraps(stock.step)
    def step(self, model_output, timestep, sample, *args, **options):
        runner = self.__dict__.get(PRIVATE) or _runner(self)
        if args:
            options.update(zip(rest, args, strict=False))
        return runner.step(self, model_output, timestep, sample, options)

    return step


def _scale_like(stock: type) -> Callable:
    """`scale_model_input` that also takes one timestep per sample."""

    @functools.wraps(stock.scale_model_input)
    def scale_model_input(self, sample, *args, **options):
        timestep = args[0] if args else options.get("timestep")
        if not is_vector(timestep) or len(timestep) != len(sample):
            return stock.scale_model_input(self, sample, *args, **options)
        return _runner(self).scale(self.__dict__, sample, timestep)

    return scale_model_input


def _runner(scheduler: object) -> Runner:
    attributes = vars(scheduler)
    if PRIVATE not in attributes:
        attributes[PRIVATE] = Runner(stock_class(type(scheduler)), None)
    return attributes[PRIVATE]


def _rebuild(stock: type, philox: int | tuple[int, ...] | None, strict: bool) -> object:
    made = object.__new__(fast_class(stock))
    vars(made)[PRIVATE] = Runner(stock, philox, strict)
    return made
