"""Measures which tile serves each convolution of a model best on this GPU: what `python -m fastdiff tune` does.

Only there: no sampling, capture or trace ever measures. What is found is read by the next process.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fastdiff.graph import StepGraph

Run = Callable[[], None]
Clock = Callable[[Mapping[object, Run], torch.device], dict[object, float]]

# 3 x 3 convolutions of the UNets at their usual size: channels in, channels out, height and width
CONVOLUTIONS = {
    "sd15": (
        (320, 320, 64), (640, 320, 64), (640, 640, 32), (1280, 640, 32), (1920, 640, 32), (1280, 1280, 16),
        (2560, 1280, 16), (1280, 1280, 8), (2560, 1280, 8),
    ),
    "sdxl": (
        (320, 320, 128), (640, 320, 128), (640, 640, 64), (1280, 640, 64), (1920, 640, 64), (1280, 1280, 32),
        (2560, 1280, 32), (1920, 1280, 32),
    ),
}  # fmt: skip
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
GAIN = 0.97  # of the time: what is less better is noise
FLIGHT, MAX_SETS = 200e6, 16  # bytes of rotating buffers, more than any cache holds; copies at most
_SLICE = 0.02  # seconds of one measurement


@dataclass(frozen=True)
class Choice:
    """What was measured for one key: seconds of the tile that serves it now, and of the fastest."""

    key: str
    before: tuple
    after: tuple
    before_seconds: float
    after_seconds: float


def convolutions(models: list[str], batch: int, types: list[str], machine) -> dict[str, object]:
    """Calls to measure, by key, each once: those of several models may be alike."""
    from fastdiff.kernels.conv2d_launch import TMA_TILES, Call, Sizes, splits_of

    calls = {}
    for model in models:
        for channels, n, size in CONVOLUTIONS[model]:
            for name in types:
                dtype, sizes = TYPES[name], Sizes(batch, size, size, size, size, 3, 1, 1, 1, 1)
                splits = splits_of(machine.processors, sizes, n, channels * dtype.itemsize)
                call = Call(sizes, (channels,), n, dtype, splits, machine.arch in TMA_TILES)
                calls[call.key] = call
    return calls


def tune(calls: Mapping[str, object], machine, device: torch.device, seconds: float, clock: Clock) -> Iterator[Choice]:
    """Measures every tile that can serve each call, until `seconds` have passed; yields one choice per call.

    A tile other than the tables' own has to be faster by 3 % or more. RuntimeError inside a capture or a trace.
    """
    from fastdiff.kernels.conv2d_launch import tile_of

    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError("tune: cannot measure inside a capture or a trace; run it by itself")
    deadline = time.monotonic() + seconds
    for key, call in calls.items():
        if time.monotonic() > deadline:
            return
        before = tile_of(machine, call)
        found = clock(_runs(call, machine, device), device)
        fastest = min(found, key=found.get)
        after = fastest if found[fastest] < GAIN * found[before] else before
        yield Choice(key, before, after, found[before], found[after])


def _runs(call, machine, device: torch.device) -> dict[tuple, Run]:
    """The call with each tile that can serve it, all on the same tensors, which are made when the first of them runs."""
    from fastdiff.kernels.conv2d_launch import tiles_for

    sets = functools.cache(lambda: _tensors(call, device))
    return {tile: functools.partial(_run, call, tile, sets) for tile in tiles_for(machine.arch, call)}


def _tensors(call, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """(x, weight, scales, bias, out), as often as is needed that none of them is in a cache when its turn comes."""
    (channels,), sizes, n = call.channels, call.sizes, call.n
    x, weight = (sizes.batch, sizes.height, sizes.width, channels), (n + -n % 16, sizes.kernel**2 * channels)
    out_dtype = torch.bfloat16 if call.dtype == torch.int8 else call.dtype
    nbytes = (math.prod(x) + math.prod(weight)) * call.dtype.itemsize
    sets = range(min(max(math.ceil(FLIGHT / nbytes), 2), MAX_SETS))
    make = lambda shape: _random(shape, call.dtype, device)
    empty = lambda: torch.empty(sizes.batch, sizes.out_height, sizes.out_width, n, dtype=out_dtype, device=device)
    return [
        (make(x), make(weight), torch.ones(n, device=device), torch.zeros(n, device=device), empty()) for _ in sets
    ]


def _run(call, tile, sets: Callable[[], list]) -> None:
    """The convolution of every set."""
    from fastdiff.kernels.conv2d_launch import conv2d_triton

    for x, weight, scale, bias, out in sets():
        of_x, of_weight = (scale[:1], scale) if call.dtype == torch.int8 else (None, None)
        rest = (call.sizes, of_weight, bias, None, None, None, tile, call.splits)
        conv2d_triton(out, [(x, of_x)], weight, list(call.channels), *rest)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as they come in use: zeros would let a GPU clock higher."""
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


def gpu_clock(runs: Mapping[object, Run], device: torch.device) -> dict[object, float]:
    """Median seconds of each run, replayed as a graph, in turns."""
    graphs = {}
    for name, run in runs.items():
        run()  # compiles and loads what a capture must not
        graphs[name] = StepGraph(run, device)
    once = {name: _replays(graph, 1) for name, graph in graphs.items()}
    count = {name: max(1, int(_SLICE / seconds)) for name, seconds in once.items()}
    samples: dict[object, list[float]] = {name: [] for name in graphs}
    for _ in range(7):
        for name, graph in graphs.items():
            samples[name].append(_replays(graph, count[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def _replays(graph: StepGraph, count: int) -> float:
    """Seconds of one of `count` replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / count
