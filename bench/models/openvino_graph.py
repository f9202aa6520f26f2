"""OpenVINO graphs of the workloads: exported from the torch module, quantized after training by NNCF, kept in a cache."""

import json
import os
import resource
import time
from pathlib import Path

import torch

from bench.models.workloads import WORKLOADS, Workload

CACHE = "FASTDIFF_BENCH_CACHE"  # environment variable with the folder of exported graphs


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE, Path.home() / ".cache" / "fastdiff-bench"))


def graph_file(workload: Workload, int8: bool) -> Path:
    return cache_folder() / f"{workload.ir}{'_int8' if int8 else ''}.xml"


def is_prepared(workload: Workload, int8: bool) -> bool:
    return _record_file(workload, int8).exists()


def prepared(workload: Workload, int8: bool) -> dict:
    """Seconds and peak memory that preparing the graph took: {"seconds", "peak_rss_mb"}."""
    return json.loads(_record_file(workload, int8).read_text())


def prepare(workload: Workload, int8: bool) -> None:
    """Exports the float32 graph, then quantizes it; costs minutes and 10 GB for the largest models."""
    if not is_prepared(workload, False):
        start = time.perf_counter()
        _export(workload)
        _write_record(workload, False, time.perf_counter() - start)
    if int8 and not is_prepared(workload, True):
        start = time.perf_counter()
        _quantize(workload)
        _write_record(workload, True, time.perf_counter() - start + prepared(workload, False)["seconds"])


def _source(workload: Workload) -> Workload:
    return WORKLOADS[workload.traced_from] if workload.traced_from else workload


class _Call(torch.nn.Module):
    """The denoiser with positional arguments and one result."""

    def __init__(self, module: torch.nn.Module, call) -> None:
        super().__init__()
        self.module, self._call = module, call

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._call(self.module, *inputs)


@torch.no_grad()
def _export(workload: Workload) -> None:
    import openvino

    source = _source(workload)
    inputs = source.inputs(0)
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if workload.traced_from:
        shapes[0] = (*shapes[0][:2], -1, -1)
    model = openvino.convert_model(_Call(source.build(), source.call), example_input=inputs, input=shapes)
    cache_folder().mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, graph_file(workload, False), compress_to_fp16=False)


def _quantize(workload: Workload) -> None:
    import nncf
    import openvino

    source = _source(workload)
    model = openvino.Core().read_model(graph_file(workload, False))
    model.reshape({port: tuple(t.shape) for port, t in zip(model.inputs, source.inputs(0), strict=True)})
    data = nncf.Dataset(_calibration(source), lambda inputs: [tensor.numpy() for tensor in inputs])
    model = nncf.quantize(model, data, subset_size=workload.calibration, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, graph_file(workload, True), compress_to_fp16=False)


@torch.no_grad()
def _calibration(workload: Workload) -> list[tuple[torch.Tensor, ...]]:
    """Inputs of real steps for the bundled models, noise at spread timesteps for random weights."""
    if not workload.name.startswith("bundled"):
        return [workload.inputs(seed) for seed in range(1, workload.calibration + 1)]
    from bench.models.sampling import trajectory

    module = workload.build()
    return trajectory(workload, lambda *inputs: workload.call(module, *inputs), workload.calibration)


def _record_file(workload: Workload, int8: bool) -> Path:
    return graph_file(workload, int8).with_suffix(".json")


def _write_record(workload: Workload, int8: bool, seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = {"seconds": round(seconds, 1), "peak_rss_mb": round(peak)}
    _record_file(workload, int8).write_text(json.dumps(record))
