"""Timing: warm up, interleave the contenders, report median and spread with the machine beside it."""

import ctypes
import dataclasses
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

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


def copy_bandwidth(size: int = 1 << 26, device: str = "cpu") -> float:
    """Bytes per second (read + written) of copying a large tensor: the limit that memory-bound ops are held to.

    On a CPU the better of torch's copy and libc's memcpy on as many threads, whose stores bypass the caches.
    """
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    contenders = {"copy": lambda: target.copy_(source)}
    if device == "cpu":
        contenders["memcpy"] = _threaded_memcpy(target, source)
    timings = interleave(contenders, seconds=1.0)
    return max(2 * source.nbytes / (timing.p10_us * 1e-6) for timing in timings.values())


def _threaded_memcpy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    threads = torch.get_num_threads()
    part = source.nbytes // threads
    pool = ThreadPoolExecutor(threads)
    copy = lambda t: ctypes.memmove(target.data_ptr() + t * part, source.data_ptr() + t * part, part)  # frees the GIL
    return lambda: list(pool.map(copy, range(threads)))


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
