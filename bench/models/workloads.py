"""What is timed: denoisers, their inputs, and whole samplings."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.models.architectures import (
    bundled,
    ddpm,
    dit,
    flux,
    ltx,
    pixart_sigma,
    sana,
    sd3_medium,
    sd15,
    sdxl,
    seeded,
    vae_decoder,
    wan,
)
from bench.models.pipelines import PIPELINES, Pipeline

NULL_LABEL = 10  # of the bundled DiT


@dataclass(frozen=True)
class Workload:
    """One denoiser at one batch size.

    build       () -> the module, float32, in evaluation mode
    inputs      seed -> positional arguments of `call`
    call        (module, *inputs) -> the prediction
    layout      "channels" where channels_last helps torch's convolutions, "tokens" otherwise
    ir          file stem of the exported graph
    traced_from workload whose inputs it is traced and calibrated with, its spatial size left open; this one where None
    calibration how many inputs the quantizer of a peer sees
    images      rows of a whole sampling instead of one forward, or None
    guidance    classifier-free guidance scale of that sampling; above 1 doubles the rows
    pipeline    a whole call of a pipeline around this denoiser, or None
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    call: Callable[..., torch.Tensor]
    layout: str
    ir: str
    traced_from: str | None = None
    calibration: int = 4
    images: int | None = None
    guidance: float = 1.0
    pipeline: Pipeline | None = None


def _latents(shape: tuple[int, ...], *more: Callable, steps: str = "int64") -> Callable[[int], tuple]:
    """Inputs of a denoiser: noise, timesteps (the middle one for seed 0, else spread), and what `more` makes."""

    def make(seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        t = torch.full((shape[0],), 500 if seed == 0 else (seed * 367) % 1000, dtype=getattr(torch, steps))
        return torch.randn(shape, generator=generator), t, *(one(shape[0], generator) for one in more)

    return make


def _labels(classes: int) -> Callable:
    return lambda batch, generator: torch.arange(batch) % classes


def _vector(width: int) -> Callable:
    return lambda batch, generator: torch.randn(batch, width, generator=generator)


def _text(tokens: int, width: int) -> Callable:
    return lambda batch, generator: torch.randn(batch, tokens, width, generator=generator)


def _mask(tokens: int, *counted: int) -> Callable:
    """1 for the tokens of a text that count: a prompt's, and those of an empty one."""
    return lambda batch, generator: (torch.arange(tokens) < torch.tensor(counted)[:, None]).float()


def _call_dit(module, x, t, y):
    return module(x, timestep=t, class_labels=y, return_dict=False)[0]


def _call_unet(module, x, t, *text):
    return module(x, t, *text, return_dict=False)[0]


def _call_sdxl(module, x, t, text, pooled):
    sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]], device=x.device, dtype=x.dtype).expand(len(x), -1)
    return module(x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}, return_dict=False)[0]


def _call_masked(module, x, t, text, mask):
    call = {"timestep": t, "encoder_hidden_states": text, "encoder_attention_mask": mask}
    return module(x, **call, return_dict=False)[0]


def _call_ltx(module, x, t, text, mask):
    place = {"num_frames": 2, "height": 12, "width": 16, "rope_interpolation_scale": (8 / 25, 32, 32)}
    return module(x, text, t, mask, **place, return_dict=False)[0]


def _call_sd3(module, x, t, text, pooled):
    return module(x, text, pooled, t, return_dict=False)[0]


def _call_flux(module, x, t, text, pooled):
    height = math.isqrt(x.shape[1])
    on = {"device": x.device}
    sides = (torch.arange(float(n), **on) for n in (height, x.shape[1] // height))
    ids = torch.cartesian_prod(torch.zeros(1, **on), *sides), torch.zeros(text.shape[1], 3, **on)
    guidance = torch.full((len(x),), 3.5, **on)
    return module(x, text, pooled, t / 1000, *ids, guidance, return_dict=False)[0]


def _call_decoder(module, x, t):
    return module(x)


def _call_plain(module, *inputs):
    return module(*inputs)


def _make_dit(name: str, *sizes: int) -> Workload:
    build = functools.partial(seeded, functools.partial(dit, *sizes))
    size, classes = sizes[3:]
    inputs = _latents((2, 4, size, size), _labels(classes))
    return Workload(name, build, inputs, _call_dit, "tokens", f"{name}_b2")


def _make_sd15(size: int) -> Workload:
    build = functools.partial(seeded, sd15)
    inputs = _latents((2, 4, size, size), _text(77, 768))
    return Workload(
        f"sd15_{size}", build, inputs, _call_unet, "channels", "sd15_b2", traced_from="sd15_32", calibration=2
    )


def _make_ddpm(batch: int) -> Workload:
    name = f"ddpm_cifar10_b{batch}"
    return Workload(name, functools.partial(seeded, ddpm), _latents((batch, 3, 32, 32)), _call_unet, "channels", name)


def _make_bundled(kind: str, batch: int, sampling: bool = False) -> Workload:
    guided = sampling and kind == "dit"
    rows = 2 * batch if guided else batch
    more = [_labels(NULL_LABEL)] if kind == "dit" else []
    return Workload(
        f"bundled_{kind}_{'sampling_' if sampling else ''}b{batch}",
        functools.partial(bundled, kind),
        _latents((rows, 1, 32, 32), *more, steps="float32"),
        _call_plain,
        "tokens" if kind == "dit" else "channels",
        f"bundled_{kind}_b{rows}",
        calibration=20,
        images=batch if sampling else None,
        guidance=2.0 if guided else 1.0,
    )


def _joints() -> tuple[Workload, ...]:
    """Stable Diffusion 3 Medium and FLUX.1 at 512 pixels, few of their blocks; the decoder of their likes at 256."""
    conditions = lambda tokens, width: (_text(tokens, 4096), _vector(width))
    return (
        _make_context(
            "sd3_medium_4blocks",
            functools.partial(sd3_medium, 4),
            _latents((2, 16, 64, 64), *conditions(333, 2048)),
            _call_sd3,
        ),
        _make_context(
            "flux_small_1double_2single",
            functools.partial(flux, 1, 2),
            _latents((1, 1024, 64), *conditions(512, 768)),
            _call_flux,
        ),
        Workload(
            "vae_decoder_256",
            functools.partial(seeded, vae_decoder),
            _latents((1, 4, 32, 32)),
            _call_decoder,
            "channels",
            "vae_decoder_256",
        ),
    )


def _make_context(name: str, build: Callable, inputs: Callable, call: Callable) -> Workload:
    """Transformers with a context at their published widths; the name says how few of their blocks."""
    return Workload(name, functools.partial(seeded, build), inputs, call, "tokens", name, calibration=2)


def _contexts() -> tuple[Workload, ...]:
    """PixArt-Sigma at 256 pixels, Sana 0.6B at 1024, Wan 1.3B and LTX-Video 2B on short videos."""
    masked = lambda tokens, width: (_text(tokens, width), _mask(tokens, 20, 1))
    return (
        _make_context(
            "pixart_sigma_8blocks",
            functools.partial(pixart_sigma, 8, 32),
            _latents((2, 4, 32, 32), *masked(300, 4096)),
            _call_masked,
        ),
        _make_context(
            "sana_small_4blocks",
            functools.partial(sana, 4),
            _latents((2, 32, 32, 32), *masked(300, 2304)),
            _call_masked,
        ),
        _make_context(
            "wan_small_3blocks", functools.partial(wan, 3), _latents((1, 16, 3, 32, 48), _text(512, 4096)), _call_unet
        ),
        _make_context(
            "ltx_small_3blocks", functools.partial(ltx, 3), _latents((2, 384, 128), *masked(128, 4096)), _call_ltx
        ),
    )


def _large() -> tuple[Workload, ...]:
    """SDXL, Stable Diffusion 3 Medium and FLUX.1 as a whole at 1024 pixels: for GPUs."""
    unet = functools.partial(seeded, sdxl)
    given = _latents((2, 4, 128, 128), _text(77, 2048), _vector(1280))
    return (
        Workload("sdxl_128", unet, given, _call_sdxl, "channels", "sdxl_128", calibration=2),
        _make_context(
            "sd3_medium",
            functools.partial(sd3_medium, 24),
            _latents((2, 16, 128, 128), _text(333, 4096), _vector(2048)),
            _call_sd3,
        ),
        _make_context(
            "flux",
            functools.partial(flux, 19, 38),
            _latents((1, 4096, 64), _text(512, 4096), _vector(768)),
            _call_flux,
        ),
    )


def _make_pipelines() -> list[Workload]:
    """Whole calls around denoisers that are also timed alone."""
    denoisers = {"sd15_pipeline": _make_sd15(32), "dit_xl2_pipeline": _make_dit("dit_xl2", 16, 72, 28, 32, 1000)}
    return [dataclasses.replace(denoisers[name], name=name, pipeline=p) for name, p in PIPELINES.items()]


_ALL = (
    _make_dit("dit_tiny", 4, 64, 4, 16, 10),
    _make_dit("dit_s2", 6, 64, 12, 32, 1000),
    _make_dit("dit_b2", 12, 64, 12, 32, 1000),
    _make_dit("dit_xl2", 16, 72, 28, 32, 1000),
    _make_sd15(32),
    _make_sd15(64),
    *(_make_ddpm(batch) for batch in (1, 8)),
    *_contexts(),
    *_joints(),
    *_large(),
    *(_make_bundled(kind, batch) for kind in ("dit", "unet") for batch in (1, 16)),
    *(_make_bundled(kind, batch, sampling=True) for kind in ("dit", "unet") for batch in (1, 16)),
    *_make_pipelines(),
)
WORKLOADS = {workload.name: workload for workload in _ALL}


def select(names: list[str]) -> list[Workload]:
    """The workloads of these names; a name without its batch (`ddpm_cifar10`, `bundled_dit`) means all of them."""
    chosen = []
    for name in names:
        found = [w for w in _ALL if w.name == name] or [w for w in _ALL if w.name.startswith(name + "_")]
        if not found:
            raise ValueError(f"bench.models: unknown model {name!r}; known are {', '.join(WORKLOADS)}")
        chosen += [w for w in found if w not in chosen]
    return chosen
