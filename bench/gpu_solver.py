"""Times the solver step on a GPU, alone and in graphs, against torch and diffusers."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator

import torch

from bench.timing import Timing, interleave
from fastdiff.graph import StepGraph
from fastdiff.ops import backend
from fastdiff.ops.solver_step import bind, solver_step
from fastdiff.ops.solver_step_samples import make_call

SHAPES = ((2, 4, 64, 64), (1, 16, 128, 128), (1, 16, 21, 90, 160))
# slots read, slots of h and of x that are written: what DPM++ 2M and UniPC-2 do with guidance
ROWS = {"dpmpp-2m": (1, 0, -1), "unipc-2": (3, 0, 2)}
SCHEDULERS = {"dpmpp-2m": "DPMSolverMultistepScheduler", "unipc-2": "UniPCMultistepScheduler"}
FLIGHT = 200e6  # bytes of rotating buffers: more than any cache holds
LINES = 100_000  # of `rows`: every replay uses one


def solver_timings(device: str, bandwidth: float, seconds: float) -> Iterator[dict]:
    for row in ROWS:
        for shape in SHAPES:
            size = _bytes(row, shape)
            sets = min(max(math.ceil(FLIGHT / size), 2), 64)
            contenders = dict(_contenders(row, shape, device, sets))
            for name, timing in interleave(contenders, seconds).items():
                each = Timing(timing.median_us / sets, timing.p10_us / sets, timing.p90_us / sets, timing.n)
                fraction = size / (each.median_us * 1e-6) / bandwidth
                record = {
                    "op": "solver_step",
                    "row": row,
                    "shape": shape,
                    "contender": name,
                    "bytes": size,
                    "sets": sets,
                }
                yield {**record, **dataclasses.asdict(each), "fraction_of_memory": fraction}


def _bytes(row: str, shape: tuple[int, ...]) -> int:
    """What one step must move: the state and history in float32, two model outputs and two inputs in bfloat16."""
    reads, slot_h, slot_x = ROWS[row]
    return math.prod(shape) * (8 + 4 * reads + 4 * (slot_h >= 0) + 4 * (slot_x >= 0) + 2 * 2 + 2 * 2)


def call(row: str, shape: tuple[int, ...], device: str, seed: int) -> tuple:
    """The arguments of one step of a guided solver; every line of `rows` is the same row of the table."""
    reads, slot_h, slot_x = ROWS[row]
    generator = torch.Generator().manual_seed(seed)
    args = list(make_call(generator, device, shape=shape, model=torch.bfloat16, slots=reads, copies=2))
    args[3].zero_()
    meta = torch.tensor([[slot_h, slot_x, 0, 0, 0, 0]] * len(args[8]), dtype=torch.int32, device=device)
    args[8], args[9] = meta, torch.zeros(LINES, shape[0], dtype=torch.int32, device=device)
    return tuple(args)


def _contenders(row: str, shape: tuple[int, ...], device: str, sets: int) -> Iterator[tuple[str, Callable]]:
    """Callables that make one step on each of `sets` buffers; "graph" replays a capture of that."""
    calls = [call(row, shape, device, seed) for seed in range(sets)]
    for variant, refusal in solver_step.explain(*calls[0]).items():
        if not refusal and variant != "reference":
            yield f"{variant}, graph", captured(_bound(variant, calls), device)
            yield variant, _bound(variant, calls)
    plain = lambda: [_eager(call) for call in calls]
    yield "torch, graph", captured(plain, device)
    yield "torch", plain
    yield "copy of as many bytes, graph", captured(_copies(_bytes(row, shape), sets, device), device)
    if importlib.util.find_spec("diffusers"):
        yield f"diffusers {SCHEDULERS[row]}", _diffusers(row, shape, device, sets)


def _bound(variant: str, calls: list[tuple]) -> Callable[[], None]:
    """Steps as the sampler makes them: arguments checked and the variant chosen once."""
    with backend(variant):
        steps = [(bind(*call[:4], *call[5:]), call[4]) for call in calls]

    def run() -> None:
        for step, outputs in steps:
            step(outputs)

    return run


def captured(run: Callable[[], object], device: str) -> Callable[[], None]:
    """A replay of what run does, without Python."""
    run()  # compiles and loads what a capture must not
    return StepGraph(run, torch.device(device)).replay


def _eager(call: tuple) -> None:
    """Guidance, conversion, update and the next input in plain torch, with constants in place of coefficients."""
    x, history, model_input, _, (cond, uncond), *_ = call
    noise_pred = uncond + 5.0 * (cond - uncond)
    h = (x - 0.6 * noise_pred.float()) * 1.25
    new_x = 0.7 * x + 0.4 * h
    for slot in history:
        new_x = new_x - 0.1 * slot
    history[0].copy_(h)
    if len(history) > 1:
        history[-1].copy_(x)
    x.copy_(new_x)
    model_input.copy_(new_x)


def _copies(size: int, sets: int, device: str) -> Callable[[], None]:
    pairs = [torch.ones(2, size // 8, device=device) for _ in range(sets)]  # half is read, half written

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return run


def _diffusers(row: str, shape: tuple[int, ...], device: str, sets: int) -> Callable[[], None]:
    import diffusers

    scheduler = getattr(diffusers, SCHEDULERS[row])()
    x = torch.randn(shape, device=device)
    cond, uncond = torch.randn(2, *shape, device=device, dtype=torch.bfloat16)

    def run() -> None:
        scheduler.set_timesteps(sets, device=device)
        sample = x
        for t in scheduler.timesteps[:sets]:
            sample = scheduler.step(uncond + 5.0 * (cond - uncond), t, sample, return_dict=False)[0]

    return run
