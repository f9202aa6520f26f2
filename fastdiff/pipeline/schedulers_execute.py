"""Carries out one planned step of a diffusers scheduler: memory, noise, kernel, results."""

import importlib
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastdiff.ops.philox_normal import philox_normal
from fastdiff.pipeline.schedulers_dtypes import dtypes
from fastdiff.pipeline.schedulers_plan import Plan
from fastdiff.solvers.row import STEP_STREAM

if TYPE_CHECKING:
    from fastdiff.pipeline.schedulers_memory import Memory
    from fastdiff.pipeline.schedulers_runner import Runner


class Noise(NamedTuple):
    """The arguments `generator` and `variance_noise` of a step."""

    generator: torch.Generator | list[torch.Generator] | None
    given: torch.Tensor | None


def execute(runner: "Runner", plan: Plan, output: torch.Tensor, sample: torch.Tensor, noise: Noise, call: tuple):
    """The results of a step, as the scheduler returns them. call  (timestep, options), for what only dtypes decide."""
    memory = runner.memory
    dtype, kinds, drawn_in = memory.dtype, None, memory.dtype
    if output.dtype is not dtype or sample.dtype is not dtype:
        kinds, drawn_in = kinds_of(runner, plan, output, sample, call)
        sample = sample.to(dtype)
    if not sample.is_contiguous():
        sample = sample.contiguous()
    if plan.noise == "none":
        x = torch.empty_like(sample)
    elif plan.noise == "output":
        x = torch.empty_like(sample).copy_(output)
    else:
        x = _noise(runner, plan, sample, noise, drawn_in)
    row, *further = memory.numbers(plan)
    outputs = [output, *(memory.views[slot] for slot in plan.inputs)] if plan.inputs else [output]
    others = _further(memory, plan, further, x, sample, outputs) if further else ()
    history = torch.empty((1, *memory.shape), dtype=dtype, device=memory.device) if plan.own_h else memory.history
    result = x
    if plan.keep >= 0:
        copy = memory.views[plan.keep]
    elif kinds is not None and kinds[0] is not dtype:
        result = copy = torch.empty_like(sample, dtype=kinds[0])
    else:
        copy = None
    memory.run(row, x, history, copy, sample, outputs)
    if plan.results == ("next",) and plan.kind is None and kinds is None:
        return (result,)
    return _results(plan, result, history, others, kinds)


def _further(memory: "Memory", plan: Plan, rows: list[int], x, sample, outputs) -> list[torch.Tensor]:
    """The results that are neither the next state nor the prediction, by a pass for each."""
    made, direct = [], memory.is_direct()
    for place, row in enumerate(rows, start=len(plan.places) - len(rows)):
        # other variants may write back the whole history
        target = memory.views[plan.places[place]] if place >= 0 and direct else torch.empty_like(sample)
        if plan.noise in ("drawn", "given", "output"):
            target.copy_(x)
        memory.run(row, target, memory.history, None, sample, outputs)
        if place >= 0 and not direct:
            memory.views[plan.places[place]].copy_(target)
        made.append(target)
    return made


def _results(plan: Plan, result: torch.Tensor, history: torch.Tensor, others, kinds) -> object:
    values = []
    for place, what in enumerate(plan.results):
        if what is None:
            value = None
        elif what == "next":
            value = result
        elif what == "h":
            value = history[0] if plan.own_h else history[plan.slot_h].clone()
        else:
            value = others[what]
        values.append(value if kinds is None or value is None else value.to(kinds[place]))
    return tuple(values) if plan.kind is None else plan.kind(**dict(zip(plan.names, values, strict=True)))


def kinds_of(runner: "Runner", plan: Plan, output, sample, call: tuple) -> tuple[list, torch.dtype | None]:
    """([dtype of each result], dtype in which noise is drawn) for half precision and mixtures."""
    timestep, options = call
    key = plan, output.dtype, sample.dtype
    if key not in runner.kinds:
        when = runner.attributes.as_argument(timestep)
        given = (runner.stock, runner.node.state, when, options, sample.dim())
        runner.kinds[key] = dtypes(*given, output.dtype, sample.dtype)
    return runner.kinds[key]


def _noise(
    runner: "Runner", plan: Plan, sample: torch.Tensor, noise: Noise, drawn_in: torch.dtype | None
) -> torch.Tensor:
    """Fresh memory with the noise of this step in it, if it is made outside the kernel."""
    if plan.noise == "given":
        return noise.given.to(sample.dtype).reshape(sample.shape).clone(memory_format=torch.contiguous_format)
    if runner.philox is not None:
        set_seeds(runner, noise.generator)
        if plan.noise == "kernel":
            return torch.empty_like(sample)
        return counted(runner, [plan.node.depth - 1] * len(sample), sample)
    return draw(sample.shape, noise.generator, drawn_in or torch.float32, sample.device).to(sample.dtype)


def counted(runner: "Runner", steps: list[int], like: torch.Tensor) -> torch.Tensor:
    """Philox noise of these steps, one per sample."""
    step = torch.tensor(steps, dtype=torch.int32, device=like.device)
    z = philox_normal(runner.memory.seed, step, torch.full_like(step, STEP_STREAM), like[0].numel())
    return z.reshape(like.shape).to(like.dtype)


def draw(shape: torch.Size, generator, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal noise exactly as diffusers draws it."""
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == device.type):
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)
    drawn = importlib.import_module("diffusers.utils.torch_utils")
    return drawn.randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)


def set_seeds(runner: "Runner", generator) -> None:
    """Noise keys of the samples: those of the generators, else those given to as_fast."""
    memory, seeds = runner.memory, runner.philox
    if generator is not None:
        seeds = [g.initial_seed() for g in generator] if isinstance(generator, list) else generator.initial_seed()
    if isinstance(seeds, int):
        seeds = [seeds + b for b in range(len(memory.seed))]
    if len(seeds) != len(memory.seed):
        raise ValueError(f"as_fast: {len(memory.seed)} seeds expected, one per sample, got {len(seeds)}")
    signed = [s % 2**64 - (s % 2**64 >> 63 << 64) for s in seeds]
    if signed != memory.seeds:
        memory.seed.copy_(torch.tensor(signed, dtype=torch.int64))
        memory.seeds = signed
