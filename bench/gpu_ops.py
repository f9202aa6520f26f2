"""Times every op at the shapes of real models: `GPU_SHAPES` of bench/cases/<op>.py, in bfloat16, captured in graphs.

The contenders are those of the case, and ours once more with each variant forced that serves the call.
"""

import dataclasses
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator

import torch

from bench.cases import Case
from bench.gpu_solver import FLIGHT, captured
from bench.timing import Timing, interleave
from fastdiff.ops import OPS, backend

MAX_SETS = 16  # copies of a case's tensors; together they exceed every cache
Run = Callable[[], object]


def shapes_of(name: str) -> tuple:
    """The shapes that an op is timed at on a GPU, none for ops without cases."""
    if importlib.util.find_spec(f"bench.cases.{name}") is None:
        return ()
    return getattr(importlib.import_module(f"bench.cases.{name}"), "GPU_SHAPES", ())


def cases_of(name: str, shape: tuple, device: str) -> list[Case]:
    """The cases of one shape, with fresh random data."""
    module = importlib.import_module(f"bench.cases.{name}")
    return list(module.cases(device, (shape,), torch.bfloat16))


def op_timings(
    device: str, bandwidth: float, seconds: float, deadline: float, capture: Callable[[Run, str], Run] = captured
) -> Iterator[dict]:
    """One record per op, shape and contender, until the clock passes `deadline`."""
    for name in OPS:
        for shape in shapes_of(name):
            if time.monotonic() > deadline:
                yield {"op": name, "shape": shape, "skipped": "no time left"}
                continue
            first = cases_of(name, shape, device)
            sets = min(max(math.ceil(FLIGHT / max(case.bytes for case in first)), 2), MAX_SETS)
            rest = [cases_of(name, shape, device) for _ in range(sets - 1)]
            for column in zip(first, *rest, strict=True):
                yield from _time(name, column, device, bandwidth, seconds, capture)


def _time(
    name: str, column: tuple[Case, ...], device: str, bandwidth: float, seconds: float, capture
) -> Iterator[dict]:
    case, sets = column[0], len(column)
    ready: dict[str, Run] = {}
    for label, run in _contenders(name, column):
        try:
            ready[label] = capture(run, device)
        except RuntimeError as error:  # a variant that refuses, a peer that cannot be captured
            yield {"op": name, "case": case.label, "contender": label, "skipped": str(error).splitlines()[0]}
    for label, timing in interleave(ready, seconds).items():
        each = Timing(timing.median_us / sets, timing.p10_us / sets, timing.p90_us / sets, timing.n)
        second = each.median_us * 1e-6
        rates = {"fraction_of_memory": case.bytes / second / bandwidth, "tflops": case.flops / second / 1e12}
        yield {"op": name, "case": case.label, "contender": label, "sets": sets, **dataclasses.asdict(each), **rates}


def _contenders(name: str, column: tuple[Case, ...]) -> Iterator[tuple[str, Run]]:
    """What does the work of all cases of a column: ours, each variant of ours, the peers."""
    variants = [v.name for v in OPS[name].variants if "cuda" in v.devices and v.name != "reference"]
    for label in column[0].contenders:
        calls = [case.contenders[label] for case in column]
        yield label, in_turn(calls)
        if label.startswith("fastdiff"):
            yield from ((f"{label}, {variant}", in_turn(calls, variant)) for variant in variants)


def in_turn(calls: list[Run], variant: str | None = None) -> Run:
    """All calls one after another, with the variant forced."""

    def run() -> None:
        with backend(variant):
            for call in calls:
                call()

    return run
