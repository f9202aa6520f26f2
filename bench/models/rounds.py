"""Which workers are loaded together, and in which order they run: A B A B, in groups that fit into memory."""

import contextlib
import fcntl
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.models.reference import describe, relative_error
from bench.models.variants import VARIANTS
from bench.models.worker import Worker, start
from bench.models.workloads import WORKLOADS, Workload

_PROCESS_MB = 700  # a Python process with torch and diffusers, besides the weights
_RESERVE_MB = 1500
_SETTLE_SECONDS = 0.03  # OpenMP threads spin for some milliseconds after a run; then they sleep
_AUTOGROUP = Path("/proc/self/autogroup")
_CLEAN = 0.04  # share of the processors that others may take in a sample that counts


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    threads    of every worker
    rounds     samples per variant
    seconds    of samples after which a slow variant sits out, once it has three
    memory_mb  what may be loaded at once; 0 for what is free
    lock       file whose lock is held during the rounds, so that several benchmarks do not time each other
    nice       of this session's scheduling group (Linux autogroup) during the rounds; below 0 needs the right to
    """

    threads: int = 2
    rounds: int = 9
    seconds: float = 60.0
    memory_mb: int = 0
    lock: str = ""
    nice: int = 0

    def __post_init__(self) -> None:
        if self.threads < 1 or self.rounds < 1:
            raise ValueError(f"bench.models: threads and rounds must be >= 1, got {self.threads} and {self.rounds}")


@dataclass
class Measured:
    """A variant's samples and what is known of it; `error` is the reason why there are none."""

    variant: str
    group: int = 0
    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    spent: float = 0.0
    setup: dict[str, float] = field(default_factory=dict)
    relative_error: float | None = None
    after: dict[str, int | str] = field(default_factory=dict)

    @property
    def clean(self) -> list[float]:
        """Samples during which others left the processors alone; the cleaner half where there are fewer than three."""
        clean = [s for s, share in zip(self.seconds, self.others, strict=True) if share < _CLEAN]
        if len(clean) >= min(3, len(self.seconds)):
            return clean
        ranked = sorted(zip(self.others, self.seconds, strict=True))
        return [s for _, s in ranked[: max(min(3, len(ranked)), len(ranked) // 2)]]

    @property
    def median(self) -> float:
        return statistics.median(self.clean)


def measure(workload: Workload, variants: list[str], limits: Limits) -> tuple[dict, list[Measured]]:
    """Times variants of a workload. The first one runs in every group; its samples of the other groups are kept apart.

    Returns ({"flops", "parameters"}, one Measured per variant and group).
    """
    for name in variants:
        if VARIANTS[name].prepare:
            process = start(_prepare, limits.threads, workload.name, name)
            process.join()  # where it fails, loading the variant will say so
    about = _describe(workload, limits.threads)
    found = []
    for index, group in enumerate(_groups(variants, about["parameters"], limits.memory_mb or _free_mb()), 1):
        found += _measure_group(workload, group, index, about["output"], limits)
    return about, found


def _prepare(workload: str, variant: str) -> None:
    VARIANTS[variant].prepare(WORKLOADS[workload])


def _describe(workload: Workload, threads: int) -> dict:
    pipe, other = multiprocessing.Pipe()
    process = start(describe, threads, other, workload.name)
    other.close()
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"bench.models: the reference of {workload.name} did not run") from None
    finally:
        process.join()


def _groups(variants: list[str], parameters: int, memory_mb: int) -> list[list[str]]:
    """The first variant in each group, with as many of the others as fit beside it."""
    need = {name: _PROCESS_MB + VARIANTS[name].bytes * parameters / 2**20 for name in variants}
    first, *rest = variants
    groups = [[first]]
    for name in rest:
        if len(groups[-1]) > 1 and sum(need[n] for n in (*groups[-1], name)) > memory_mb - _RESERVE_MB:
            groups.append([first])
        groups[-1].append(name)
    return groups


def _free_mb() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) // 1024


def _measure_group(workload: Workload, names: list[str], group: int, reference, limits: Limits) -> list[Measured]:
    found = [Measured(name, group) for name in names]
    workers = []
    for entry in found:
        worker = Worker(workload.name, entry.variant, limits.threads)
        entry.error = worker.error
        if worker.error is None:
            entry.setup = worker.first["seconds"]
            entry.relative_error = relative_error(worker.first["output"], reference)
            workers.append((worker, entry))
    with _undisturbed(limits):
        for _ in range(limits.rounds):
            for worker, entry in workers:
                if entry.error is None and (len(entry.seconds) < 3 or entry.spent < limits.seconds):
                    _take(worker.sample(), entry)
    for worker, entry in workers:
        entry.after = worker.close()
    return found


@contextlib.contextmanager
def _undisturbed(limits: Limits) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if limits.lock:
            fcntl.flock(stack.enter_context(open(limits.lock, "w")), fcntl.LOCK_EX)  # closing the file gives it back
        if limits.nice:
            before = _AUTOGROUP.read_text().split()[-1]
            _AUTOGROUP.write_text(str(limits.nice))
            stack.callback(_AUTOGROUP.write_text, before)
        yield


def _take(sample: dict, entry: Measured) -> None:
    """Keeps a sample, or the reason why the worker can give none."""
    entry.error = sample.get("error")
    if entry.error is None:
        entry.seconds.append(sample["seconds"])
        entry.others.append(sample["others"])
        entry.spent += sample["wall"]
        time.sleep(_SETTLE_SECONDS)
