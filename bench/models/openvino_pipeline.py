"""A whole pipeline in OpenVINO, as optimum-intel runs it; its denoiser also quantized by NNCF, activations included."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import torch

from bench.models import openvino_graph
from bench.models.loaded import Loaded, Unavailable
from bench.models.workloads import Workload


def missing() -> str | None:
    """Why this peer cannot run, or None."""
    found = importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.intel")
    return None if found else "optimum-intel not installed; it wants an environment of its own"


def _folder(workload: Workload, int8: bool) -> Path:
    return openvino_graph.cache_folder() / f"{workload.name}{'_int8' if int8 else ''}"


def prepare(workload: Workload, int8: bool) -> None:
    """Exports the pipeline once; for int8 also a copy whose denoiser is quantized on noise at spread timesteps."""
    if missing() or workload.pipeline.peer is None:
        return
    if not (_folder(workload, False) / "seconds.json").exists():
        _timed(workload, False, _export)
    if int8 and not (_folder(workload, True) / "seconds.json").exists():
        _timed(workload, True, _quantize)


def _timed(workload: Workload, int8: bool, make) -> None:
    start = time.perf_counter()
    make(workload)
    seconds = round(time.perf_counter() - start, 1)
    (_folder(workload, int8) / "seconds.json").write_text(json.dumps(seconds))


def _peer(workload: Workload):
    import optimum.intel

    return getattr(optimum.intel, workload.pipeline.peer)


def _export(workload: Workload) -> None:
    plain = openvino_graph.cache_folder() / f"{workload.name}_torch"
    workload.pipeline.build().save_pretrained(plain)
    exported = _peer(workload).from_pretrained(plain, export=True, compile=False, load_in_8bit=False)
    exported.save_pretrained(_folder(workload, False))
    shutil.rmtree(plain)


def _quantize(workload: Workload) -> None:
    import nncf
    import openvino

    source, target = _folder(workload, False), _folder(workload, True)
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("seconds.json"))
    graph = Path(workload.pipeline.denoiser) / "openvino_model.xml"
    model = openvino.Core().read_model(source / graph)
    data = [workload.inputs(seed) for seed in range(1, workload.calibration + 1)]
    model.reshape({port: tuple(_fit(port, t).shape) for port, t in zip(model.inputs, data[0], strict=True)})
    feed = lambda given: [_fit(port, t).numpy() for port, t in zip(model.inputs, given, strict=True)]
    made = nncf.quantize(model, nncf.Dataset(data, feed), subset_size=len(data), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(made, target / graph, compress_to_fp16=False)


def _fit(port, tensor: torch.Tensor) -> torch.Tensor:
    """A denoiser takes one timestep where ours is told one for each sample."""
    return tensor if len(port.partial_shape) == tensor.dim() else tensor[0]


def load(workload: Workload, hint: str, int8: bool, threads: int) -> Loaded:
    """The compiled pipeline at static shapes. Raises Unavailable."""
    if workload.pipeline.peer is None:
        raise Unavailable("optimum-intel has no such pipeline")
    if reason := missing():
        raise Unavailable(reason)
    start, folder = time.perf_counter(), _folder(workload, int8)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
    pipe = _peer(workload).from_pretrained(folder, compile=False, ov_config=settings, safety_checker=None)
    given = workload.pipeline.arguments
    pipe.reshape(batch_size=1, height=given["height"], width=given["width"], num_images_per_prompt=1)
    pipe.compile()
    pipe.set_progress_bar_config(disable=True)
    seconds = {"compile": time.perf_counter() - start}
    exported = [_folder(workload, False)] + ([folder] if int8 else [])
    seconds["export and quantize"] = sum(json.loads((f / "seconds.json").read_text()) for f in exported)
    return Loaded(lambda: workload.pipeline(pipe), seconds)
