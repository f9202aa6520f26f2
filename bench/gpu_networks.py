"""Times one call of whole networks on a GPU: ours beside torch's bfloat16, eager and compiled. Weights are random."""

import copy
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from bench.models.reference import relative_error
from bench.models.workloads import WORKLOADS, Workload
from bench.timing import interleave

NETWORKS = tuple(WORKLOADS[name] for name in ("dit_xl2", "sd15_64", "sdxl_128", "sd3_medium", "flux"))
FIRST = ("torch bf16", "fastdiff bf16", "fastdiff w8a8")
SECOND = ("torch.compile bf16", "fastdiff w8a8")  # compiling takes minutes: it comes when everything else is known


def network_timings(
    workloads: Sequence[Workload], device: str, bandwidth: float, seconds: float, deadline: float
) -> Iterator[dict]:
    """One record per network and contender, until the clock passes `deadline`."""
    missing = "" if importlib.util.find_spec("diffusers") else "diffusers is not installed"
    for labels in (FIRST, SECOND):
        for workload in workloads:
            record = {"op": "network", "case": workload.name}
            why = missing or ("no time left" if time.monotonic() > deadline else "")
            if why:
                yield from ({**record, "contender": label, "skipped": why} for label in labels)
                continue
            for row in _time(workload, labels, device, seconds):
                yield {**record, **row, "fraction_of_memory": row["weights"] / row["median_us"] * 1e6 / bandwidth}
            if device == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def _time(workload: Workload, labels: Sequence[str], device: str, seconds: float) -> Iterator[dict]:
    with torch.device(device):
        module = workload.build()
    inputs = [tensor.to(device) for tensor in workload.inputs(0)]
    truth = _exactly(lambda: workload.call(module, *inputs)).cpu()
    module.to(torch.bfloat16)
    inputs = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in inputs]
    made = {label: _contender(label, module, workload) for label in labels}
    calls = {label: functools.partial(workload.call, net, *inputs) for label, (net, _) in made.items()}
    errors = {label: relative_error(run().float().cpu(), truth) for label, run in calls.items()}
    flops = _flops(workload)
    for label, timing in interleave(calls, seconds).items():
        tflops = flops / timing.median_us / 1e6
        about = {"weights": made[label][1], "relative_error": errors[label], "tflops": tflops}
        yield {"contender": label, **dataclasses.asdict(timing), **about}


def _exactly(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """In float32 products, convolutions included."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return run()


def _contender(label: str, module: nn.Module, workload: Workload) -> tuple[nn.Module, int]:
    """What a label stands for, and the bytes of its weights. Ours gives the copy's own weights up."""
    who, _, mode = label.partition(" ")
    if who == "fastdiff":
        net = fastdiff.accelerate(copy.deepcopy(module), mode, strict=True, keep_original=False)
        return net, fastdiff.report(net).bytes
    if workload.layout == "channels":
        module = copy.deepcopy(module).to(memory_format=torch.channels_last)
    weights = sum(p.nbytes for p in module.parameters())
    return torch.compile(module, mode="max-autotune") if who == "torch.compile" else module, weights


def _flops(workload: Workload) -> int:
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module = workload.build()
        workload.call(module, *(tensor.to("meta") for tensor in workload.inputs(0)))
    return counter.get_total_flops()
