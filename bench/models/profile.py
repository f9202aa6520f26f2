"""`python -m bench.models.profile --model NAME [--variant NAME]`: where a forward spends its time, by kind of operation.

Ours from the recorded program, OpenVINO's from its counters, torch's from its profiler. Counting costs time, so the shares
count and not the sum.
"""

import argparse
import collections
import sys
from collections.abc import Callable

import torch

import fastdiff
from bench.models import eager, openvino_peer
from bench.models.variants import VARIANTS
from bench.models.workloads import WORKLOADS, Workload

Call = tuple[str, float]  # kind of operation, microseconds
_RUNS = 5


def our_calls(workload: Workload, mode: str) -> Callable[[], list[Call]]:
    """Kernel calls of the program of the workload's shape, with the encoder's left out: it runs once per conditioning."""
    module, inputs = fastdiff.accelerate(workload.build(), mode=mode), workload.inputs(0)
    workload.call(module, *inputs)
    programs = list(module.__dict__["_fastdiff"]._programs.values())
    if not programs:
        raise RuntimeError(f"bench.models: this forward is not recorded as a program\n{fastdiff.report(module)}")
    return programs[-1].profile


def openvino_calls(workload: Workload, int8: bool, threads: int) -> Callable[[], list[Call]]:
    """Executed nodes with their kernels' names."""
    request = openvino_peer.request(workload, "bf16", int8, threads, {"PERF_COUNT": True})
    feed = [tensor.numpy() for tensor in workload.inputs(0)]

    def run() -> list[Call]:
        request.infer(feed)
        nodes = [node for node in request.profiling_info if str(node.status).endswith("EXECUTED")]
        return [(f"{node.node_type} {node.exec_type}", node.real_time.total_seconds() * 1e6) for node in nodes]

    return run


def torch_calls(workload: Workload, dtype: torch.dtype) -> Callable[[], list[Call]]:
    """Operations that compute themselves, by name."""
    from torch.profiler import ProfilerActivity, profile

    loaded = eager.load(workload, dtype, False)
    loaded.run()

    def run() -> list[Call]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            loaded.run()
        return [(event.name, event.self_cpu_time_total) for event in profiler.events() if event.self_cpu_time_total]

    return run


def summary(runs: list[list[Call]]) -> list[tuple[str, int, float]]:
    """(kind, calls, microseconds) of the fastest run, the most expensive kind first."""
    best = min(runs, key=lambda calls: sum(time for _, time in calls))
    count, total = collections.Counter(), collections.Counter()
    for kind, time in best:
        count[kind] += 1
        total[kind] += time
    return [(kind, count[kind], time) for kind, time in total.most_common()]


def _calls(workload: Workload, variant: str, threads: int) -> Callable[[], list[Call]]:
    family, _, kind = variant.partition("-")
    if family == "fastdiff":
        return our_calls(workload, kind)
    if family == "openvino":
        openvino_peer.prepare(workload, kind == "int8")
        return openvino_calls(workload, kind == "int8", threads)
    return torch_calls(workload, {"fp32": torch.float32, "bf16": torch.bfloat16}[kind])


@torch.no_grad()
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models.profile", description=__doc__)
    parser.add_argument("--model", required=True, choices=[name for name, w in WORKLOADS.items() if w.images is None])
    kinds = [name for name in VARIANTS if "compile" not in name and name != "openvino-fp32"]
    parser.add_argument("--variant", default="fastdiff-w8a8", choices=kinds)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    run = _calls(WORKLOADS[args.model], args.variant, args.threads)
    run()
    rows = summary([run() for _ in range(_RUNS)])
    whole = sum(time for _, _, time in rows)
    print(f"{args.model} {args.variant}: {whole / 1e3:.2f} ms in {sum(calls for _, calls, _ in rows)} calls")
    for kind, calls, time in rows:
        print(f"{time / 1e3:10.3f} ms {100 * time / whole:5.1f} % {calls:5d} x {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
