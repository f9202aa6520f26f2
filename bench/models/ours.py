"""`fastdiff.accelerate` on the same module or pipeline."""

import time

import fastdiff
from bench.models.loaded import Loaded, Unavailable
from bench.models.sampling import our_loop
from bench.models.workloads import Workload


def load(workload: Workload, mode: str, attention: str | None = None) -> Loaded:
    """The user's module, accelerated in place; samplings of bundled models run in `fastdiff.Sampler`."""
    if not hasattr(fastdiff, "accelerate"):
        raise Unavailable("this version of fastdiff has no accelerate")
    module = workload.pipeline.build() if workload.pipeline else workload.build()
    start = time.perf_counter()
    fastdiff.accelerate(module, mode=mode, attention=attention)
    seconds = {"accelerate": time.perf_counter() - start}
    if workload.pipeline:
        return Loaded(lambda: workload.pipeline(module), seconds, note=lambda: str(fastdiff.report(module)))
    inputs = workload.inputs(0)
    run = lambda: workload.call(module, *inputs)
    if workload.images is not None:
        run = our_loop(workload, module)
    return Loaded(run, seconds, note=lambda: str(fastdiff.report(module)))
