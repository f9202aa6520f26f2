"""Every pair of what users combine on one accelerated pipeline: it runs, and gives what the same pair gives without us."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import pytest
import torch

import fastdiff
from fastdiff.ops import native

if native.cpu() is None or any(importlib.util.find_spec(name) is None for name in ("diffusers", "peft", "accelerate")):
    pytest.skip("needs the compiled kernels, diffusers, peft and accelerate", allow_module_level=True)

from tiny_pipelines import TINY

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Use:
    """One thing that users do to a pipeline.

    before, after  done to any pipeline, before or after it is accelerated
    options        of `accelerate`
    call           arguments of the pipeline's call
    bound          relative error that it costs where it is lossy
    """

    before: Callable | None = None
    after: Callable | None = None
    options: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    bound: float = 1e-4


def _adapter(pipe, fuse: bool) -> None:
    """As `load_lora_weights` does, from a dictionary."""
    generator, down, up = torch.Generator().manual_seed(5), {}, {}
    for name, layer in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            down[f"unet.{name}.lora_A.weight"] = 0.3 * torch.randn(2, layer.in_features, generator=generator)
            up[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(layer.out_features, 2, generator=generator)
    pipe.load_lora_weights(down | up, adapter_name="style")
    if fuse:
        pipe.fuse_lora()


def _offload(pipe) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(pipe.unet, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def _hook(pipe) -> None:
    from accelerate import hooks

    hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())


def _tile(pipe) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size //= 2
    pipe.vae.tile_latent_min_size //= 2


def _look(pipe, step, time, tensors):
    return {"latents": 0.9 * tensors["latents"]}


def _stop(pipe, step, time, tensors):
    pipe._interrupt = step == 0
    return tensors


USES = {
    "lora": Use(after=lambda pipe: _adapter(pipe, fuse=False)),
    "fused lora": Use(after=lambda pipe: _adapter(pipe, fuse=True)),
    "compiled blocks": Use(after=lambda pipe: pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")),
    "group offload": Use(after=_offload),
    "accelerate hook": Use(after=_hook),
    "tiling": Use(after=_tile, call={"output_type": "np"}),
    "callback": Use(call={"callback_on_step_end": _look}),
    "interrupt": Use(call={"callback_on_step_end": _stop}),
    "bfloat16": Use(before=lambda pipe: pipe.to(torch.bfloat16), bound=0.06),
    "guard": Use(options={"guard": True}),
    "cache": Use(options={"cache": fastdiff.Cache(budget=0.0)}),
    "guidance": Use(options={"guidance": fastdiff.AdaptiveGuidance(1.5)}),
    "batch": Use(options={"deterministic": "batch"}),
    "int8": Use(options={"mode": "w8a8"}, bound=0.3),
    "quantized": Use(options={"quant": "w8a8"}, bound=0.3),
}
# what stands in each other's way without us too
_APART = {
    frozenset(("compiled blocks", "group offload")): "the hook of the latter is not for one graph",
    frozenset(("lora", "fused lora")): "one name for two adapters",
    frozenset(("callback", "interrupt")): "one argument for two functions",
}
PAIRS = [pair for pair in combinations(USES, 2) if frozenset(pair) not in _APART]


def _run(names: tuple[str, ...], fast: bool) -> torch.Tensor:
    uses = [USES[name] for name in names]
    pipe, call, options = TINY["SD1.5"].build(), {}, {}
    for use in uses:
        options |= use.options
        call |= use.call
        if use.before is not None:
            use.before(pipe)
    if fast:
        fastdiff.accelerate(pipe, **options)
    for use in uses:
        if use.after is not None:
            use.after(pipe)
    return TINY["SD1.5"](pipe, steps=2, **call)


@functools.cache
def _stock(names: tuple[str, ...]) -> torch.Tensor:
    return _run(names, fast=False)


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_pair(pair):
    got, expected = _run(pair, fast=True), _stock(tuple(name for name in pair if not USES[name].options))
    assert got.dtype == expected.dtype and got.isfinite().all()
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < max(USES[name].bound for name in pair)
