"""PipelineEngine: many calls of one diffusers pipeline at a time, whose denoiser sees all of them in one batch."""

import contextvars
import copy
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

from fastdiff.engine import EngineReport
from fastdiff.pipeline.drop_in import DENOISERS, is_pipeline
from fastdiff.pipeline.joint_calls import JointCalls

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class PipelineEngine:
    """Serves calls of a pipeline, each as if it had the pipeline for itself, with its own prompt, size, steps and guidance.

    Every call runs in a thread, on a copy of the pipeline that shares all weights and has a scheduler and tokenizers of its
    own. Steps need no barrier: calls of the denoiser that wait at the same time, at whatever timesteps, are made as one where
    their shapes are equal.

    pipe      accelerated or not; it is left alone, and may be used beside
    threads   calls that run at the same time; others wait, first come first served
    max_rows  rows of a joint call of the denoiser, of which guidance takes two for a picture

    Results have the bits of the same call alone where a row of the denoiser does not depend on the others, as after
    `fastdiff.accelerate(pipe, deterministic="batch")`; else they differ by rounding. Give each call a generator of its own:
    torch's global one is shared by all threads. Use it in a `with` statement, or call `shutdown`.
    """

    def __init__(self, pipe: object, *, threads: int = 8, max_rows: int = 16) -> None:
        if not is_pipeline(pipe):
            raise TypeError(f"PipelineEngine: a diffusers pipeline expected, got {type(pipe).__name__}")
        for name, value in (("threads", threads), ("max_rows", max_rows)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"PipelineEngine: {name} must be an integer >= 1, got {value!r}")
        modules = {name: pipe.components.get(name) for name in DENOISERS}
        modules = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        if not modules:
            raise ValueError(f"PipelineEngine: {type(pipe).__name__} has none of {', '.join(DENOISERS)}")
        self.pipe = pipe
        self._reports = {name: EngineReport() for name in modules}
        self._joint = {name: JointCalls(module, max_rows, self._reports[name]) for name, module in modules.items()}
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, "fastdiff.PipelineEngine", self._prepare)

    def __enter__(self) -> "PipelineEngine":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.shutdown(cancel=kind is not None)

    def submit(self, *args, **kwargs) -> Future:
        """Queues a call with these arguments of the pipeline; the result is what it would return.

        `callback_on_step_end` sees every step, runs in the thread of the call, and cancels it by raising.
        """
        return self._pool.submit(contextvars.copy_context().run, self._call, args, kwargs)

    def report(self) -> dict[str, EngineReport]:
        """For each denoiser the joint calls so far, as steps, and the calls of pipelines that they stand for, as rows."""
        return {name: copy.copy(report) for name, report in self._reports.items()}

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Takes no more calls; `cancel` drops those that have not begun, `wait` returns when the others are done."""
        self._pool.shutdown(wait, cancel_futures=cancel)

    def _prepare(self) -> None:
        """Makes the copy of the pipeline that a thread of the pool uses."""
        pipe = self._own.pipe = copy.copy(self.pipe)
        tokenizers = {name: part for name, part in pipe.components.items() if name.startswith("tokenizer")}
        # set past the pipeline's own setter, which would write into the configuration that all copies share
        vars(pipe).update({name: copy.deepcopy(part) for name, part in tokenizers.items()})
        vars(pipe).update({name: _twin(self.pipe.components[name], joint) for name, joint in self._joint.items()})

    def _call(self, args: tuple, kwargs: dict) -> object:
        pipe = self._own.pipe
        vars(pipe)["scheduler"] = copy.deepcopy(self.pipe.scheduler)
        try:
            return pipe(*args, **kwargs)
        finally:
            for joint in self._joint.values():
                joint.leave()


def _twin(module: nn.Module, forward: JointCalls) -> nn.Module:
    """A module with the same parameters and attributes whose forward is another; hooks stay with the module itself."""
    twin = copy.copy(module)
    vars(twin).update({"forward": forward, **{name: OrderedDict() for name in _HOOKS}})
    return twin
