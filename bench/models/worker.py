"""A process that holds one variant of one workload, runs it when told to, and sleeps otherwise."""

import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection

import torch

_SAMPLE_SECONDS = 0.25  # fast forwards are repeated until a sample takes this long
_LONG = 5.0  # seconds of a first call that is its own warm-up
_WARM_BELOW = 0.1  # seconds of a forward below which the caches of a worker that was asleep would show


class Worker:
    """The parent's end. `error` says why there is nothing to time; `first` what the first call gave."""

    def __init__(self, workload: str, variant: str, threads: int) -> None:
        self._pipe, other = multiprocessing.Pipe()
        self._process = start(_serve, threads, other, workload, variant, threads)
        other.close()
        self.first = self._receive()
        self.error = self.first.get("error")

    def sample(self) -> dict:
        """Seconds per call and the share of the processors that others took meanwhile."""
        self._pipe.send("run")
        return self._receive()

    def close(self) -> dict:
        """Memory of the process, which then ends, and the variant's note; empty where it has died."""
        self._pipe.send("stop")
        found = self._receive()
        self._process.join()
        return found if "error" not in found else {}

    def _receive(self) -> dict:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            return {"error": f"its process ended with code {self._process.exitcode} (-9: out of memory)"}


def start(function, threads: int, *args) -> multiprocessing.Process:
    """Runs a function in a fresh process whose OpenMP has `threads` threads; its memory goes when it ends."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # inherited; read when the child loads its OpenMP
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, daemon=True)
    process.start()
    return process


def _serve(pipe: Connection, workload: str, variant: str, threads: int) -> None:
    from bench.models.loaded import Unavailable
    from bench.models.variants import VARIANTS
    from bench.models.workloads import WORKLOADS

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    try:
        loaded = VARIANTS[variant].load(WORKLOADS[workload], threads)
        start = time.perf_counter()
        output = loaded.run().float().numpy().copy()
        seconds = {**loaded.seconds, "first call": time.perf_counter() - start}
    except Unavailable as reason:
        pipe.send({"error": str(reason)})
        return
    except Exception as error:  # whatever a runtime raises is the reason
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        return
    first = seconds["first call"]
    once = first if first > _LONG else min(_seconds(loaded.run, 1) for _ in range(2))
    pipe.send({"output": output, "seconds": seconds})
    calls = max(1, round(_SAMPLE_SECONDS / once))
    while pipe.recv() == "run":
        if once < _WARM_BELOW:
            loaded.run()
        before = _cpu_seconds()
        seconds = _seconds(loaded.run, calls)
        wall = seconds * calls
        pipe.send({"seconds": seconds, "wall": wall, "others": _others(before, _cpu_seconds(), wall)})
    memory = {"rss_mb": _status("VmRSS"), "peak_rss_mb": max(_status("VmHWM"), loaded.peak_mb)}
    pipe.send({**memory, "note": loaded.note()})


def _seconds(run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _cpu_seconds() -> tuple[float, float]:
    """(used by everybody or taken by the hypervisor, used by this process)."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = (int(n) for n in file.readline().split()[1:9])
    own = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own


def _others(before: tuple[float, float], after: tuple[float, float], seconds: float) -> float:
    used = (after[0] - before[0]) - (after[1] - before[1])
    return max(0.0, used / seconds / (os.cpu_count() or 1))


def _status(key: str) -> int:
    """A size of this process in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) // 1024
