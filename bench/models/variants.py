"""The table of what can be timed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.models import eager, openvino_peer, ours
from bench.models.loaded import Loaded
from bench.models.workloads import Workload


@dataclass(frozen=True)
class Variant:
    """One way to run a denoiser.

    precision  whose peak the time is held to: int8, bf16 or fp32
    load       (workload, threads) -> Loaded
    bytes      memory per parameter while it starts, the float32 module included, to see what fits together
    prepare    work that is done once and cached, in a process of its own
    """

    precision: str
    load: Callable[[Workload, int], Loaded]
    bytes: float
    prepare: Callable[[Workload], None] | None = None


def _ours(mode: str, precision: str, bytes: float, attention: str | None = None) -> Variant:
    return Variant(precision, lambda workload, threads: ours.load(workload, mode, attention), bytes)


def _torch(precision: str, dtype: torch.dtype, compiled: bool, bytes: float) -> Variant:
    return Variant(precision, lambda workload, threads: eager.load(workload, dtype, compiled), bytes)


def _openvino(precision: str, hint: str, int8: bool, bytes: float) -> Variant:
    load = lambda workload, threads: openvino_peer.load(workload, hint, int8, threads)
    return Variant(precision, load, bytes, partial(openvino_peer.prepare, int8=int8))


VARIANTS = {
    "fastdiff-w8a8": _ours("w8a8", "int8", 6.0),
    "fastdiff-w8a8-int8attention": _ours("w8a8", "int8", 6.0, attention="int8"),
    "fastdiff-bf16": _ours("bf16", "bf16", 7.0),
    "fastdiff-exact": _ours("exact", "fp32", 9.0),
    "openvino-int8": _openvino("int8", "bf16", True, 3.0),
    "openvino-bf16": _openvino("bf16", "bf16", False, 6.5),
    "openvino-fp32": _openvino("fp32", "f32", False, 9.0),
    "torch-fp32": _torch("fp32", torch.float32, False, 5.0),
    "torch-bf16": _torch("bf16", torch.bfloat16, False, 6.0),
    "torch-compile": _torch("bf16", torch.bfloat16, True, 8.0),
    "torch-compile-fp32": _torch("fp32", torch.float32, True, 9.0),
}
