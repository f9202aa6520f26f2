"""A whole diffusers pipeline on fused kernels: its denoisers, text encoders, VAE decoder and scheduler."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastdiff import accelerated
from fastdiff.models.lower.record import Settings
from fastdiff.pipeline import attention_backend, fused_adapters
from fastdiff.pipeline.drop_in_report import PipelineReport
from fastdiff.pipeline.paired_calls import PairedCalls
from fastdiff.pipeline.schedulers import as_fast
from fastdiff.quant import QuantConfig, Quantized
from fastdiff.quant.recipes import Recipe
from fastdiff.quantized import quantize
from fastdiff.steering import AdaptiveGuidance

Quant = str | Recipe | QuantConfig | None

_STATE = "_fastdiff"
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder", "controlnet")
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder", "text_encoder_4")
# int8 in text encoders and VAEs costs quality that the denoiser does not give back, and they run once per picture
_ONCE = {"w8a8": "bf16"}


@dataclass
class Installed:
    """What was done to a pipeline, so that it can be told and taken back.

    modules    accelerated modules by the name that reports use
    quantized  denoisers whose layers were quantized, by name
    paired     denoisers under adaptive guidance, by name
    attention  processors of theirs that call our attention where a denoiser's own forward runs
    scheduler  the scheduler before and now, or None
    left       what was left alone, and why
    """

    settings: Settings
    modules: dict[str, nn.Module] = field(default_factory=dict)
    quantized: dict[str, Quantized] = field(default_factory=dict)
    paired: dict[str, PairedCalls] = field(default_factory=dict)
    attention: list[object] = field(default_factory=list)
    scheduler: tuple[object, object] | None = None
    left: dict[str, str] = field(default_factory=dict)
    set_up_s: float = 0.0


def is_pipeline(target: object) -> bool:
    """Whether this is a diffusers pipeline, by its components."""
    return not isinstance(target, nn.Module) and isinstance(getattr(target, "components", None), dict)


def install(
    pipe: object,
    settings: Settings,
    *,
    quant: Quant,
    solver: bool,
    guard: bool,
    guidance: AdaptiveGuidance | None = None,
) -> None:
    """Accelerates a pipeline in place; where anything raises, it is as it was before it was ever accelerated."""
    parts = list(_parts(pipe))
    if not any(name in DENOISERS for name, _ in parts):
        raise ValueError(
            f"accelerate: {type(pipe).__name__} has none of {', '.join(DENOISERS)}; pass its modules one by one"
        )
    for _, module in parts:
        accelerated.check(module)
    remove(pipe)
    start = time.perf_counter()
    done = Installed(settings)
    try:
        if solver:
            _install_scheduler(pipe, done)
        for name, module in parts:
            if name in DENOISERS and quant is not None:
                done.quantized[name] = _quantize(module, quant)
                fused_adapters.keep_codes(module)
            paired = None
            if name in DENOISERS and guidance is not None:
                paired = done.paired[name] = PairedCalls(module, guidance)
            try:
                accelerated.install(module, _settings_of(name, module, settings), guard, paired and paired.around)
            except accelerated.NotServedError as error:
                if settings.strict and name in DENOISERS:
                    raise
                done.left[name] = str(error)
                done.paired.pop(name, None)
                continue
            if name in DENOISERS:
                accelerated.follow(module, lambda: getattr(pipe.scheduler, "timesteps", None))
                # the attention of walked ones is served, and told about, call by call
                if accelerated.is_lowered(module):
                    done.attention += attention_backend.choose(module)
            done.modules[name] = module
    except BaseException:
        _take_back(pipe, done)
        raise
    done.set_up_s = time.perf_counter() - start
    vars(pipe)[_STATE] = done


def remove(pipe: object) -> None:
    """Takes back what `install` did, except of components that were replaced since."""
    done = vars(pipe).get(_STATE)
    if done is None:
        return
    _take_back(pipe, done)
    del vars(pipe)[_STATE]


def describe(pipe: object) -> PipelineReport:
    """What an accelerated pipeline runs on. Raises ValueError for one that is not accelerated."""
    done = vars(pipe).get(_STATE)
    if done is None:
        raise ValueError(f"report: this {type(pipe).__name__} is not accelerated; call fastdiff.accelerate first")
    now, left = dict(_parts(pipe)), dict(done.left)
    gone = {name for name, module in done.modules.items() if now.get(name) is not module}
    left |= dict.fromkeys(sorted(gone), "replaced since by a component that is not accelerated")
    parts = {name: accelerated.describe(m) for name, m in done.modules.items() if name not in gone}
    if done.scheduler is not None and done.scheduler[1] is pipe.scheduler:
        parts["scheduler"] = pipe.scheduler.fastdiff_report()
    elif done.scheduler is not None:
        left["scheduler"] = "replaced since by one that is not accelerated"
    quantized = {name: made.nbytes for name, made in done.quantized.items()}
    guidance = {name: str(paired) for name, paired in done.paired.items() if name not in gone}
    return PipelineReport(type(pipe).__name__, parts, left, quantized, guidance, round(done.set_up_s, 3))


def follows_one_run(pipe: object) -> bool:
    """Whether something in an accelerated pipeline's denoiser keeps track of one run: a cache, or adaptive guidance."""
    done = vars(pipe).get(_STATE)
    return done is not None and (bool(done.paired) or done.settings.cache is not None)


def _parts(pipe: object) -> Iterator[tuple[str, nn.Module]]:
    """What is worth accelerating. Denoisers come last: what fails before has not cost their weights."""
    components = pipe.components
    for name in _ENCODERS:
        if isinstance(components.get(name), nn.Module):
            yield name, components[name]
    # pipelines call vae.decode, which calls this module
    decoder = getattr(components.get("vae"), "decoder", None)
    if isinstance(decoder, nn.Module):
        yield "vae.decoder", decoder
    for name in DENOISERS:
        if isinstance(components.get(name), nn.Module):
            yield name, components[name]


def _settings_of(name: str, module: nn.Module, settings: Settings) -> Settings:
    """A model loaded in bfloat16 computes in bfloat16, as it would without us."""
    if settings.mode == "exact" and {p.dtype for p in module.parameters()} == {torch.bfloat16}:
        settings = replace(settings, mode="bf16")
    if name in DENOISERS:
        return settings
    return replace(
        settings, mode=_ONCE.get(settings.mode, settings.mode), keep_original=True, strict=False, spare=(), cache=None
    )


def _install_scheduler(pipe: object, done: Installed) -> None:
    stock = getattr(pipe, "scheduler", None)
    try:
        fast = as_fast(stock, strict=done.settings.strict)
    except TypeError as error:
        if done.settings.strict:
            raise RuntimeError(f"accelerate: strict, but the scheduler runs as before: {error}") from None
        done.left["scheduler"] = str(error)
        return
    pipe.scheduler = fast
    done.scheduler = stock, fast


def _quantize(module: nn.Module, quant: Quant) -> Quantized:
    """Quantizes a denoiser; where that raises, its layers are back in place."""
    tree = [(parent, dict(parent._modules)) for parent in module.modules()]
    try:
        return quantize(module, quant, keep_originals=True)
    except BaseException:
        for parent, children in tree:
            parent._modules.update(children)
        raise


def _take_back(pipe: object, done: Installed) -> None:
    attention_backend.unchoose(done.attention)
    for module in done.modules.values():
        accelerated.remove(module)
    for made in done.quantized.values():
        fused_adapters.release(made.net)
        made.undo()
    if done.scheduler is not None and pipe.scheduler is done.scheduler[1]:
        pipe.scheduler = done.scheduler[0]
