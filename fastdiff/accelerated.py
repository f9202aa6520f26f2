"""One module on fused kernels: put there, taken back, and told about."""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import nn

from fastdiff.cache import Reuse
from fastdiff.guard import Guarded
from fastdiff.models.lower import FAMILIES
from fastdiff.models.lower.record import LayerRecord, Settings, UnsupportedError
from fastdiff.models.lower.running import Running
from fastdiff.models.lower.seat import Seat
from fastdiff.models.lower.walk import Walked
from fastdiff.ops import native

_STATE, _SEAT = "_fastdiff", "_fastdiff_seat"


class NotServedError(ValueError):
    """A module that nothing can be done for where it is, with the reason."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What runs where, and why not.

    model      class of the module
    mode       key of MODES
    lowered    whether the whole forward runs as recorded programs; else layers were replaced one by one
    layers     every layer, what it runs as, and the reason where that is not the mode's usual
    calls      how often the fused forward ran, and each reason for which the module's own ran
    bytes      of packed weights
    set_up_s   seconds that packing took
    guard      what the guard did, one sentence each
    cache      what the feature cache did, None without one
    """

    model: str
    mode: str
    lowered: bool
    layers: tuple[LayerRecord, ...]
    calls: dict[str, int]
    bytes: int
    set_up_s: float
    guard: tuple[str, ...] = ()
    cache: Reuse | None = None

    def __str__(self) -> str:
        how = "whole forward, recorded" if self.lowered else "layer by layer"
        kinds: dict[str, int] = {}
        for layer in self.layers:
            kinds[layer.runs] = kinds.get(layer.runs, 0) + 1
        lines = [f"{self.model}, mode {self.mode}: {how}; {self.bytes / 1e6:.1f} MB packed in {self.set_up_s:.2f} s"]
        lines.append("layers: " + ", ".join(f"{count} {runs}" for runs, count in kinds.items()))
        lines += [f"  {layer.name}: {layer.runs} ({layer.reason})" for layer in self.layers if layer.reason]
        lines.append("calls: " + (", ".join(f"{count} {how}" for how, count in self.calls.items()) or "none yet"))
        lines += [str(self.cache)] if self.cache else []
        return "\n".join([*lines, *(f"guard: {event}" for event in self.guard)])

    def to_dict(self) -> dict:
        """The report as plain lists, strings and numbers."""
        return dataclasses.asdict(self)

    @property
    def fallbacks(self) -> list[str]:
        """What runs as before acceleration, and why, one sentence each."""
        layers = [f"{layer.name} runs on torch: {layer.reason}" for layer in self.layers if layer.runs == "torch"]
        usual = ("fused", "own forward over fused layers")
        return layers + [
            f"{count} calls of its own forward: {why}" for why, count in self.calls.items() if why not in usual
        ]


def install(
    module: nn.Module,
    settings: Settings,
    guard: bool = False,
    wrap: Callable[[Callable], Callable] | None = None,
    calibration: Callable[[], object] | None = None,
) -> None:
    """Puts a module on fused kernels, in place; `wrap` may put something around them. Nothing is changed where it raises."""
    check(module)
    remove(module)
    own = getattr(module, "attention_precision", None)  # of a network that was quantized with its attention
    if settings.attention is None and own is not None:
        settings = dataclasses.replace(settings, attention=own)
    start = time.perf_counter()
    running, reason = _lowered(module, settings, calibration)
    if running is None:
        if settings.strict:
            raise RuntimeError(
                f"accelerate: strict, but the forward of {type(module).__name__} is not lowered: {reason}"
            )
        for what, wanted in (("a feature cache", settings.cache), ("calibration", calibration)):
            if wanted is not None:
                raise ValueError(f"accelerate: {what} needs a lowered family; {type(module).__name__}: {reason}")
        if any(p.is_cuda for p in module.parameters()):
            raise NotServedError(f"accelerate: on a GPU only known families are served; {reason}")
        running = Walked(module, settings, reason)
    running.set_up_s = time.perf_counter() - start
    run = running if wrap is None else wrap(running)
    seat = Seat(module, Guarded(module, run) if guard else run)
    try:
        seat.take()
    except UnsupportedError as error:
        raise RuntimeError(f"accelerate: {error}") from None
    running.install()
    module.__dict__.update({_STATE: running, _SEAT: seat})


def follow(module: nn.Module, schedule: Callable[[], torch.Tensor | None]) -> None:
    """Lets an accelerated module compute what depends on time and conditioning for a whole schedule, once it is met."""
    if is_lowered(module):
        module.__dict__[_STATE].schedule = schedule


def remove(module: nn.Module) -> None:
    """Takes a module off the fused kernels, in place; nothing happens to one that is not on them.

    Raises RuntimeError for a module that was accelerated with `keep_original=False`: its weights are gone.
    """
    running = module.__dict__.get(_STATE)
    if running is None:
        return
    if not running.keeps_original:
        raise RuntimeError("undo: the original weights were given up by keep_original=False; load the model again")
    module.__dict__[_SEAT].leave()
    running.remove()
    del module.__dict__[_STATE], module.__dict__[_SEAT]


def is_accelerated(module: object) -> bool:
    """Whether a module is on fused kernels."""
    return _STATE in vars(module)


def is_lowered(module: nn.Module) -> bool:
    """Whether the whole forward of an accelerated module runs as recorded programs."""
    return isinstance(module.__dict__[_STATE], Running)


def describe(module: nn.Module) -> Report:
    """What an accelerated module runs on. Raises ValueError for a module that is not accelerated."""
    if not is_accelerated(module):
        raise ValueError(f"report: this {type(module).__name__} is not accelerated; call fastdiff.accelerate first")
    running, run = module.__dict__[_STATE], module.__dict__[_SEAT].run
    record, settings = running.record, running.settings
    return Report(
        type(module).__name__,
        settings.mode,
        is_lowered(module),
        tuple(record.layers),
        dict(running.calls),
        record.nbytes,
        round(running.set_up_s, 3),
        tuple(run.events) if isinstance(run, Guarded) else (),
        dataclasses.replace(running.features.reuse) if settings.cache else None,
    )


def check(module: nn.Module) -> None:
    """Raises where no setting could help: not a module, not on a CPU or one GPU, or no kernels."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate: a torch module expected, got {type(module).__name__}")
    devices = {p.device for p in module.parameters()}
    kinds = {device.type for device in devices}
    if kinds - {"cpu", "cuda"} or len(devices) > 1:
        hint = "; accelerate it before its weights are offloaded" if "meta" in kinds else ""
        got = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"accelerate: the module must be on the cpu or on one cuda device, got {got}{hint}")
    missing = native.triton_missing() if kinds == {"cuda"} else native.cpu_missing()
    if missing:
        raise RuntimeError(f"accelerate: {missing}")


def _lowered(
    module: nn.Module, settings: Settings, calibration: Callable[[], object] | None
) -> tuple[Running | None, str]:
    if type(module).__name__ not in FAMILIES:
        return None, f"unknown family; known are {', '.join(FAMILIES)}"
    try:
        running = Running(module, settings)
        if calibration is not None:
            _observe(running, calibration)
        running.lowered  # noqa: B018 - packs the weights
        return running, ""
    except UnsupportedError as error:
        return None, str(error)


def _observe(running: Running, calibration: Callable[[], object]) -> None:
    """Runs `calibration` while calls of the module tell what enters its convolutions."""
    seat = Seat(running.module, running)
    seat.take()
    try:
        running.observe(calibration)
    finally:
        seat.leave()
