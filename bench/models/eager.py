"""Plain torch and torch.compile."""

import time

import torch

from bench.models.loaded import Loaded, Unavailable
from bench.models.sampling import diffusers_loop
from bench.models.workloads import Workload


def load(workload: Workload, dtype: torch.dtype, compiled: bool) -> Loaded:
    """The module in one dtype, channels_last where it has convolutions; compiled with frozen weights."""
    if workload.pipeline:
        return _load_pipeline(workload, dtype, compiled)
    module = workload.build()
    start = time.perf_counter()
    module.to(dtype)
    if workload.layout == "channels":
        module.to(memory_format=torch.channels_last)
    call = lambda *inputs: workload.call(module, *inputs)
    if compiled:
        call = _compiled(call)
    seconds = {"convert": time.perf_counter() - start}
    if workload.images is not None:
        return Loaded(diffusers_loop(workload, lambda x, *rest: call(_cast(x, dtype), *rest).float()), seconds)
    inputs = _converted(workload, dtype)
    return Loaded(lambda: call(*inputs), seconds)


def _load_pipeline(workload: Workload, dtype: torch.dtype, compiled: bool) -> Loaded:
    """As users run it, with channels_last where it has convolutions."""
    if compiled:
        raise Unavailable("pipelines are timed eagerly")
    pipe = workload.pipeline.build()
    start = time.perf_counter()
    pipe.to(dtype=dtype)
    for part in (getattr(pipe, workload.pipeline.denoiser), pipe.vae) if workload.layout == "channels" else ():
        part.to(memory_format=torch.channels_last)
    return Loaded(lambda: workload.pipeline(pipe), {"convert": time.perf_counter() - start})


def _compiled(call):
    try:
        import torch._inductor.config as inductor
    except ImportError as error:
        raise Unavailable(f"torch.compile has no CPU backend here: {error}") from error
    inductor.freezing = True
    return torch.compile(call, dynamic=False)


def _converted(workload: Workload, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Inputs in the module's dtype; timesteps and labels stay as they are."""
    x, t, *rest = workload.inputs(0)
    if workload.layout == "channels":
        x = x.contiguous(memory_format=torch.channels_last)
    return _cast(x, dtype), t, *(_cast(tensor, dtype) for tensor in rest)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
