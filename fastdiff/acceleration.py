"""`accelerate`, `undo` and `report`: a diffusers pipeline or any torch denoiser on fused kernels, in place and reversibly."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from fastdiff import accelerated
from fastdiff.accelerated import Report
from fastdiff.cache import Cache
from fastdiff.models.lower.record import Settings
from fastdiff.pipeline.drop_in import PipelineReport, Quant, describe, install, is_pipeline, remove
from fastdiff.steering import AdaptiveGuidance

Target = TypeVar("Target")


def accelerate(
    target: Target,
    mode: str = "exact",
    *,
    quant: Quant = None,
    attention: str | None = None,
    solver: bool = True,
    cache: Cache | None = None,
    guidance: AdaptiveGuidance | None = None,
    deterministic: str = "run",
    strict: bool = False,
    guard: bool = False,
    spare: Mapping[str, str] | Sequence[str] = (),
    exact_time: bool | None = None,
    keep_original: bool = True,
    calibration: Callable[[], object] | None = None,
    **unknown: object,
) -> Target:
    """Makes a diffusers pipeline, or a module, run on fused kernels, in place, and returns it. `undo` takes it back.

    mode           "exact" (float32, equal to the module up to rounding), "bf16", or "w8a8": int8 weights with a scale per
                   output channel, activations quantized as they come (no calibration). Of a pipeline the denoisers run in
                   this mode, text encoders and the VAE's decoder in bf16 at least, and models loaded in bfloat16 stay so
    quant          recipe of `fastdiff.quantize` for the denoisers of a pipeline, that needs no calibration
    attention      precision of attention: "f32", "bf16" or "int8" (default: the mode's; int8 is never a default)
    solver         put the steps of a pipeline's scheduler on the fused kernel
    cache          a `fastdiff.Cache`: use features of inner blocks again within an error budget (lossy; known families)
    guidance       a `fastdiff.AdaptiveGuidance` for a pipeline: leave out negative branches that no longer matter (lossy)
    deterministic  "run": equal calls have equal bits; "batch": rows of lowered models do not depend on their batch either;
                   "off": layers of models that are not lowered are timed, and keep what is faster on this machine. Those of
                   known families are not: they hand codes and residuals to each other, and none of torch's takes those
    strict         raise RuntimeError where a module, or a pipeline's denoiser or scheduler, would run as before; else
                   `report` tells where
    guard          look for NaN and Inf after every call, and do the layer that made them again in float32
    spare          names of layers that stay in floating point (in the record's spelling), with or without reasons
    exact_time     compute the temporal table with the batches that ask for it, bit for bit like the module (default: in
                   mode "exact"); False fills it for whole schedules at once, within 1e-6
    keep_original  False gives up the original weights layer by layer, which halves the memory but cannot be undone
    calibration    a call that samples a few steps with the module, as `lambda: sampler.sample((4, 3, 32, 32), steps=10)`:
                   in mode "w8a8" the inputs of convolutions get static ranges, one for each time that it was called with
                   (other times take the nearest); without, each sample is quantized by its own largest magnitude

    Known families (`fastdiff.models.lower.FAMILIES`) run their whole forward as one recorded program per input shape, on a
    GPU as a CUDA graph; of any other module, on a CPU, the layers are replaced one by one. Weights may be changed later: those of known families are packed
    again at the next call. Calls that need a gradient, and arguments that the kernels do not know, run the module's own forward.

    Raises TypeError for an unknown option, ValueError for unknown settings or a module that is neither on the CPU nor
    on one GPU, or of an unknown family there; RuntimeError where the kernels are not built or under `strict`; a pipeline that could not be accelerated is as it was.
    """
    if unknown:
        raise TypeError(_unknown(next(iter(unknown))))
    settings = Settings(mode, attention, spare, exact_time, keep_original, strict, deterministic, cache)
    if is_pipeline(target):
        if calibration is not None:
            raise ValueError("accelerate: calibration is for modules; accelerate the pipeline's denoiser by itself")
        install(target, settings, quant=quant, solver=solver, guard=guard, guidance=guidance)
        return target
    if quant is not None:
        raise ValueError("accelerate: quant is for pipelines; call fastdiff.quantize(module, recipe) first")
    if guidance is not None:
        raise ValueError("accelerate: guidance is for pipelines; a Sampler takes it among its hooks")
    if calibration is not None and mode != "w8a8":
        raise ValueError(f"accelerate: calibration is for mode 'w8a8', got {mode!r}")
    accelerated.install(target, settings, guard, calibration=calibration)
    return target


def undo(target: Target) -> Target:
    """Gives a module or a pipeline its own forwards and scheduler back, weights untouched, and frees ours.

    Does nothing to one that is not accelerated. Raises RuntimeError for one that was accelerated with
    `keep_original=False`: its weights are gone.
    """
    if is_pipeline(target):
        remove(target)
    elif isinstance(target, nn.Module):
        accelerated.remove(target)
    return target


def report(target: object) -> Report | PipelineReport:
    """What an accelerated module or pipeline runs on. Raises ValueError for one that is not accelerated."""
    return describe(target) if is_pipeline(target) else accelerated.describe(target)


def _unknown(option: str) -> str:
    known = [name for name in inspect.signature(accelerate).parameters if name not in ("target", "unknown")]
    close = difflib.get_close_matches(option, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"accelerate: unknown option {option!r}; {hint}"
