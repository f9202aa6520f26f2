"""Timing: warm up, interleave the contenders, report median and spread with the machine beside it."""

import dataclasses
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fastdiff.ops import native

_SAMPLE_SECONDS = 2e-3  # calls are repeated until one sample takes this long, so that the clock does not count


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call over `n` samples."""

    median_us: float
    p10_us: float
    p90_us: float
    n: int


def interleave(
    contenders: Mapping[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 200
) -> dict[str, Timing]:
    """Times callables in turns, A B A B, on whatever device they use.

    seconds  per contender at most; at least five rounds are made
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    inner = {name: _calls_per_sample(run, synchronize) for name, run in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds * len(contenders)
    for done in range(rounds):
        for name, run in contenders.items():
            samples[name].append(_sample(run, inner[name], synchronize))
        if done >= 4 and time.perf_counter() > end:
            break
    return {name: _summary(values) for name, values in samples.items()}


def _calls_per_sample(run: Callable, synchronize: Callable) -> int:
    for _ in range(3):
        run()
    once = max(_sample(run, 1, synchronize), 1e-7)
    return max(1, int(_SAMPLE_SECONDS / once))


def _sample(run: Callable, calls: int, synchronize: Callable) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - start) / calls


def _summary(values: list[float]) -> Timing:
    ordered = sorted(1e6 * value for value in values)
    at = lambda fraction: ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]
    return Timing(statistics.median(ordered), at(0.1), at(0.9), len(ordered))


def memory_bandwidth(size: int = 1 << 26, device: str = "cpu") -> float:
    """Bytes per second that large tensors can be read and written with: the limit that memory-bound ops are held to.

    On a CPU the better of torch's copy and a STREAM triad whose stores bypass the caches; on a GPU the copy. Tensors of
    2^26 floats are far larger than any cache; ops on smaller ones may exceed this limit.
    """
    a, b, out = (torch.ones(size, dtype=torch.float32, device=device) for _ in range(3))
    contenders = {"copy": (2, lambda: out.copy_(a))}
    module = native.cpu() if device == "cpu" else None
    if module and all(t.data_ptr() % 64 == 0 for t in (a, b, out)):
        contenders["triad"] = (3, lambda: module.stream_triad(out.data_ptr(), a.data_ptr(), b.data_ptr(), size))
    timings = interleave({name: run for name, (_, run) in contenders.items()}, seconds=1.0)
    return max(contenders[name][0] * a.nbytes / (timing.p10_us * 1e-6) for name, timing in timings.items())


def header() -> dict:
    """What every record carries: machine, threads, versions, commit, date."""
    return {
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from fastdiff.info import cpu_model

    return cpu_model()


def _commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
