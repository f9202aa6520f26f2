"""OpenVINO's CPU plugin on an exported graph."""

import importlib.util
import time

import torch

from bench.models import openvino_graph, openvino_pipeline
from bench.models.loaded import Loaded, Unavailable
from bench.models.sampling import diffusers_loop
from bench.models.workloads import Workload


def missing(int8: bool) -> str | None:
    """Why this peer cannot run, or None."""
    absent = [name for name in ("openvino", *(["nncf"] if int8 else [])) if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed; pip install 'fastdiff-engine[peers]'" if absent else None


def prepare(workload: Workload, int8: bool) -> None:
    """Exports and quantizes unless the cache has it."""
    if workload.pipeline:
        openvino_pipeline.prepare(workload, int8)
    elif missing(int8) is None and not openvino_graph.is_prepared(workload, int8):
        openvino_graph.prepare(workload, int8)


def load(workload: Workload, hint: str, int8: bool, threads: int) -> Loaded:
    """The compiled graph at the workload's static shapes, or the pipeline's graphs."""
    if workload.pipeline:
        return openvino_pipeline.load(workload, hint, int8, threads)
    start = time.perf_counter()
    forward = _forward(request(workload, hint, int8, threads))
    record = openvino_graph.prepared(workload, int8)
    seconds = {"export and quantize": record["seconds"], "compile": time.perf_counter() - start}
    inputs = workload.inputs(0)
    run = diffusers_loop(workload, forward) if workload.images is not None else lambda: forward(*inputs)
    return Loaded(run, seconds, record["peak_rss_mb"])


def request(workload: Workload, hint: str, int8: bool, threads: int, more: dict | None = None):
    """An OpenVINO infer request; `more` are further properties. Raises Unavailable.

    hint  INFERENCE_PRECISION_HINT: bf16 or f32; int8 graphs run what is not quantized in that precision
    """
    if reason := missing(int8):
        raise Unavailable(reason)
    import openvino

    core = openvino.Core()
    model = core.read_model(openvino_graph.graph_file(workload, int8))
    model.reshape({port: tuple(t.shape) for port, t in zip(model.inputs, workload.inputs(0), strict=True)})
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
    return core.compile_model(model, "CPU", config | (more or {})).create_infer_request()


def _forward(request):
    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        feed = [tensor.numpy() for tensor in inputs]
        # the result is a view of OpenVINO's buffer, which the next call overwrites
        return torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

    return forward
