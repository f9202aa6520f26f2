"""What must hold on a GPU before anything is timed: right numbers, replayable graphs, memory in bounds."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.gpu_ops import cases_of, shapes_of
from fastdiff.graph import StepGraph
from fastdiff.ops import OPS, backend
from fastdiff.ops.solver_step import bind, solver_step
from fastdiff.ops.solver_step_samples import make_call

ROOT = Path(__file__).parents[1]
LARGEST_CHECKED = 64e6  # bytes of a case: the reference of attention keeps all scores


def check_numbers(device: str, largest: int | None = None) -> Iterator[dict]:
    """Every op x variant x sample against the float64 reference; one record each.

    A variant passes when its error is at most twice that of the plain torch reference in the same types, plus 1e-6.
    Freshly allocated memory holds NaN meanwhile, so an element that nobody wrote fails.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for op in OPS.values():
            for index, args in enumerate(op.samples(device)):
                if largest is None or max((t.numel() for t in _tensors(args)), default=0) <= largest:
                    yield from _check_sample(op, index, args)
    finally:
        torch.use_deterministic_algorithms(False)


def _check_sample(op, index: int, args: tuple) -> Iterator[dict]:
    wide = [_map(a, lambda t: t.double() if t.is_floating_point() else t) for a in args]
    truth, plain = _listed(op.reference(*wide)), _listed(op.reference(*args))
    for name, refusal in op.explain(*args).items():
        if name == "reference" or refusal:
            continue
        with backend(name):
            got = _results(op, args)
        error = max((_error(g, t, p) for g, t, p in zip(got, truth, plain, strict=True)), default=0.0)
        yield {
            "check": "numbers",
            "op": op.name,
            "variant": name,
            "sample": index,
            "excess": error,
            "pass": error <= 0,
        }


def _error(got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> float:
    """By how much the error is above its limit, relative to the largest value; infinite where NaN or infinity differ."""
    got, truth, plain = got.double(), truth.double(), plain.double()
    usual = truth.isfinite() & plain.isfinite()
    if not torch.equal(got.isfinite() & usual, usual):
        return float("inf")
    if not usual.any():
        return 0.0
    scale = max(float(truth[usual].abs().max()), 1.0)
    worst = lambda values: float((values[usual] - truth[usual]).abs().max()) / scale
    return worst(got) - (2 * worst(plain) + 1e-6)


def _results(op, args: tuple) -> list[torch.Tensor]:
    args = [copy.deepcopy(a) if n in op.mutates else a for n, a in zip(op.signature.parameters, args, strict=True)]
    out = op(*args)
    if not op.mutates:
        return _listed(out)
    return [a for n, a in zip(op.signature.parameters, args, strict=True) if n in op.mutates]


def _listed(out) -> list[torch.Tensor]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _map(value, change):
    if isinstance(value, list):
        return [change(v) for v in value]
    return change(value) if isinstance(value, torch.Tensor) else value


def _tensors(args: tuple) -> list[torch.Tensor]:
    flat = [v for a in args for v in (a if isinstance(a, list) else [a])]
    return [v for v in flat if isinstance(v, torch.Tensor)]


def check_cases(device: str) -> Iterator[dict]:
    """Every variant at the shapes of real models, with fresh random data, against the reference on the same.

    Relative distance to the float32 reference; results have the rounding of bfloat16 (2e-3), those of "int8" of codes.
    """
    for name, op in OPS.items():
        for shape in shapes_of(name):
            for case in cases_of(name, shape, device):
                if case.bytes > LARGEST_CHECKED:
                    continue
                for label in (label for label in case.contenders if label.startswith("fastdiff")):
                    yield from _check_case(op, case, label)


def _check_case(op, case, label: str) -> Iterator[dict]:
    limit = 5e-2 if "int8" in label else 1e-2
    try:
        with backend("reference"):
            want = _listed(case.contenders[label]())
    except torch.cuda.OutOfMemoryError:
        return
    for variant in (v.name for v in op.variants if "cuda" in v.devices and v.name != "reference"):
        record = {"check": "case", "op": op.name, "variant": variant, "case": case.label, "contender": label}
        try:
            with backend(variant):
                got = _listed(case.contenders[label]())
        except RuntimeError as refusal:
            yield {**record, "pass": None, "why": str(refusal).splitlines()[0]}
            continue
        distance = max(_distance(g, w) for g, w in zip(got, want, strict=True))
        yield {**record, "distance": distance, "pass": distance <= limit}


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def check_graphs(
    device: str, graph: Callable[[Callable[[], None], torch.device], object] = StepGraph
) -> Iterator[dict]:
    """A replay of every variant of every op that returns its results gives the bits of an eager call.

    The results are overwritten between capture and replay: a launch that escaped to another stream leaves them so.
    """
    for op in (op for op in OPS.values() if not op.mutates):
        args = max(op.samples(device), key=lambda args: max((t.numel() for t in _tensors(args)), default=0))
        for name, refusal in op.explain(*args).items():
            if name == "reference" or refusal:
                continue
            with backend(name):
                eager, held = _listed(op(*args)), []
                captured = graph(
                    lambda args=args, op=op, held=held: held.extend(_listed(op(*args))), torch.device(device)
                )
            for tensor in held:
                tensor.fill_(7)
            captured.replay()
            same = all(torch.equal(a.nan_to_num(5), b.nan_to_num(5)) for a, b in zip(eager, held, strict=True))
            yield {"check": "graph", "op": op.name, "variant": name, "pass": same}


def check_graph(device: str, variant: str) -> dict:
    """Three replays of one captured step, on a stream of their own, equal three eager steps bit for bit."""
    args = list(make_call(torch.Generator().manual_seed(1), device, shape=(2, 4, 32, 32), noises=2, copies=2))
    args[9] = torch.randint(0, 3, (3, 2), dtype=torch.int32, device=device)  # three lines of rows
    args[3].zero_()
    eager, captured = copy.deepcopy(args), copy.deepcopy(args)
    before = [t.clone() for t in captured[:4]]
    with backend(variant):
        for _ in range(3):
            solver_step(*eager)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            solver_step(*captured)  # compiles and loads before the capture
            for tensor, value in zip(captured[:4], before, strict=True):
                tensor.copy_(value)
            step = bind(*captured[:4], *captured[5:])
            graph = StepGraph(lambda: step(captured[4]), torch.device(device))
            for _ in range(3):
                graph.replay()
    torch.cuda.synchronize()
    same = all(torch.equal(a, b) for a, b in zip(eager[:4], captured[:4], strict=True))
    return {"check": "graph", "op": "solver_step", "variant": variant, "pass": same}


def check_memory() -> dict:
    """compute-sanitizer over the smallest samples; `pass` is None where the tool is absent."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"check": "memory", "pass": None, "why": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "66", sys.executable, "-m", "bench.gpu_checks"]
    # each tensor its own allocation: neighbours cannot hide a read past the end
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return {"check": "memory", "pass": done.returncode == 0, "why": done.stdout[-500:] if done.returncode else ""}


if __name__ == "__main__":
    sys.exit(not all(record["pass"] for record in check_numbers("cuda", largest=400)))
