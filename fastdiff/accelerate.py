"""`accelerate`, `undo` and `report`: any torch denoiser on fused kernels, in place and reversibly."""

import dataclasses
import time

from torch import nn

from fastdiff.models.lower import FAMILIES
from fastdiff.models.lower.record import ATTENTION, MODES, LayerRecord, UnsupportedError
from fastdiff.models.lower.running import Running
from fastdiff.models.lower.walk import Walked
from fastdiff.ops import native

_STATE = "_fastdiff"


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
    """

    model: str
    mode: str
    lowered: bool
    layers: tuple[LayerRecord, ...]
    calls: dict[str, int]
    bytes: int
    set_up_s: float

    def __str__(self) -> str:
        how = "whole forward, recorded" if self.lowered else "layer by layer"
        kinds: dict[str, int] = {}
        for layer in self.layers:
            kinds[layer.runs] = kinds.get(layer.runs, 0) + 1
        lines = [f"{self.model}, mode {self.mode}: {how}; {self.bytes / 1e6:.1f} MB packed in {self.set_up_s:.2f} s"]
        lines.append("layers: " + ", ".join(f"{count} {runs}" for runs, count in kinds.items()))
        lines += [f"  {layer.name}: {layer.runs} ({layer.reason})" for layer in self.layers if layer.reason]
        lines.append("calls: " + (", ".join(f"{count} {how}" for how, count in self.calls.items()) or "none yet"))
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The report as plain lists, strings and numbers."""
        return dataclasses.asdict(self)


def accelerate(
    module: nn.Module,
    mode: str = "exact",
    *,
    attention: str | None = None,
    spare: dict[str, str] | list[str] | None = None,
    exact_time: bool | None = None,
    keep_original: bool = True,
    strict: bool = False,
) -> nn.Module:
    """Makes a module on the CPU run on fused kernels, in place, and returns it. `undo` takes it back.

    mode           "exact" (float32, equal to the module up to rounding), "bf16", or "w8a8": int8 weights with a scale per
                   output channel, activations quantized as they come (no calibration)
    attention      precision of attention: "f32", "bf16" or "int8" (default: the mode's; int8 is never a default)
    spare          names of layers that stay in floating point (in the record's spelling), with or without reasons
    exact_time     compute the temporal table with the batches that ask for it, bit for bit like the module (default: in
                   mode "exact"); False fills it for whole schedules at once, within 1e-6
    keep_original  False gives up the original weights layer by layer, which halves the memory but cannot be undone
    strict         raise RuntimeError where a layer or a call would run as before; else `report` tells which

    Known families (`fastdiff.models.lower.FAMILIES`) run their whole forward as one recorded program per input shape; of
    any other module the layers are replaced one by one. Weights may be changed later: they are packed again at the next
    call. Calls that need a gradient, and arguments that the kernels do not know, run the module's own forward.

    Raises ValueError for unknown settings or a module that is not on the CPU, RuntimeError where the kernels are not built
    or under `strict`.
    """
    _check(module, mode, attention)
    undo(module)
    chosen = MODES[mode] if attention is None else dataclasses.replace(MODES[mode], attention=attention)
    spared = spare if isinstance(spare, dict) else dict.fromkeys(spare or (), "asked for")
    exact = mode == "exact" if exact_time is None else exact_time
    start = time.perf_counter()
    running, reason = _lowered(module, (chosen, spared, exact, keep_original, strict))
    if running is None:
        if strict:
            raise RuntimeError(
                f"accelerate: strict, but the forward of {type(module).__name__} is not lowered: {reason}"
            )
        running = Walked(module, chosen, spared, keep_original, reason)
    running.name, running.set_up_s = mode, time.perf_counter() - start
    module.__dict__[_STATE] = running
    running.install()
    return module


def undo(module: nn.Module) -> nn.Module:
    """Gives a module its own forward back, weights untouched, and frees ours. Does nothing to one that is not accelerated.

    Raises RuntimeError for a module that was accelerated with `keep_original=False`: its weights are gone.
    """
    running = module.__dict__.get(_STATE)
    if running is not None:
        if not running.keeps_original:
            raise RuntimeError("undo: the original weights were given up by keep_original=False; load the model again")
        running.remove()
        del module.__dict__[_STATE]
    return module


def report(module: nn.Module) -> Report:
    """What an accelerated module runs on. Raises ValueError for a module that is not accelerated."""
    running = module.__dict__.get(_STATE)
    if running is None:
        raise ValueError(f"report: this {type(module).__name__} is not accelerated; call fastdiff.accelerate first")
    record = running.record
    return Report(
        type(module).__name__,
        running.name,
        isinstance(running, Running),
        tuple(record.layers),
        dict(running.calls),
        record.nbytes,
        round(running.set_up_s, 3),
    )


def _check(module: nn.Module, mode: str, attention: str | None) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate: a torch module expected, got {type(module).__name__}")
    if mode not in MODES:
        raise ValueError(f"accelerate: unknown mode {mode!r}; known are {', '.join(MODES)}")
    if attention not in (None, *ATTENTION):
        raise ValueError(f"accelerate: unknown attention {attention!r}; known are {', '.join(ATTENTION)}")
    devices = {p.device.type for p in module.parameters()}
    if devices - {"cpu"}:
        raise ValueError(f"accelerate: the module must be on the cpu, got {', '.join(sorted(devices))}")
    if native.cpu() is None:
        raise RuntimeError(f"accelerate: {native.cpu_missing()}")


def _lowered(module: nn.Module, settings: tuple) -> tuple[Running | None, str]:
    if type(module).__name__ not in FAMILIES:
        return None, f"unknown family; known are {', '.join(FAMILIES)}"
    try:
        running = Running(module, *settings)
        running.lowered  # noqa: B018 - packs the weights
        return running, ""
    except UnsupportedError as error:
        return None, str(error)
