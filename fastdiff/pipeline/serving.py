"""PipelineEngine: many calls of one diffusers pipeline at a time, whose denoiser sees all of them in one batch."""

import contextvars
import copy
import threading
import time
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from torch import nn

from fastdiff.engine import EngineReport
from fastdiff.pipeline.drop_in import DENOISERS, follows_one_run, is_pipeline
from fastdiff.pipeline.joint_calls import JointCalls

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class PipelineRequest(Future):
    """A call that was submitted: a `concurrent.futures.Future` of what the pipeline returns, which can also be cancelled
    while it runs.

    calls  of the denoiser so far
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.submitted = time.perf_counter()
        self._withdrawn = False

    def cancel(self) -> bool:
        """Has it end before its next call of the denoiser, with CancelledError as its result. False where it is done."""
        self._withdrawn = super().cancel() or not self.done()
        return self._withdrawn

    def cancelled(self) -> bool:
        """Whether it ended so."""
        return super().cancelled() or (self.done() and isinstance(self.exception(), CancelledError))

    def count(self) -> None:
        """Counts a call of the denoiser. Raises CancelledError instead where that was asked for."""
        if self._withdrawn:
            raise CancelledError
        self.calls += 1


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
        if follows_one_run(pipe):
            raise ValueError(
                "PipelineEngine: cache= and guidance= of accelerate follow one run; accelerate it without them"
            )
        self.pipe, self._own = pipe, threading.local()
        self._lock = threading.Lock()  # guards what follows
        self._open: dict[PipelineRequest, None] = {}  # not done
        self._report = EngineReport()
        count = lambda: self._own.request.count()
        self._joint = {name: JointCalls(module, count, max_rows, self._note) for name, module in modules.items()}
        self._pool = ThreadPoolExecutor(threads, "fastdiff.PipelineEngine")

    def __enter__(self) -> "PipelineEngine":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.shutdown(cancel=kind is not None)

    def submit(self, *args, **kwargs) -> PipelineRequest:
        """Queues a call with these arguments of the pipeline; the result is what it would return.

        `callback_on_step_end` sees every step, in the thread of the call.
        """
        request = PipelineRequest()
        with self._lock:
            self._open[request] = None
        request.add_done_callback(self._settled)
        try:
            self._pool.submit(contextvars.copy_context().run, self._call, request, args, kwargs)
        except RuntimeError:
            request.cancel()
            raise
        return request

    def report(self) -> EngineReport:
        """What has been done so far: joint calls of the denoiser are its steps, the calls they stand for its rows."""
        with self._lock:
            running = sum(request.running() for request in self._open)
            return self._report.now(len(self._open) - running, running)

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Takes no more calls; with `cancel` withdraws all there are, and with `wait` returns when the rest is done."""
        if cancel:
            with self._lock:
                pending = list(self._open)
            for request in pending:
                request.cancel()
        self._pool.shutdown(wait)

    def _note(self, calls: int, rows: int, seconds: float) -> None:
        with self._lock:
            self._report.stepped(calls, rows, seconds)

    def _settled(self, request: PipelineRequest) -> None:
        with self._lock:
            self._open.pop(request)
            self._report.settled(CancelledError() if request.cancelled() else request.exception())

    def _copy(self) -> object:
        """The copy of the pipeline that this thread uses, with a new scheduler."""
        if not hasattr(self._own, "pipe"):
            self._own.pipe = self._new_copy()
        vars(self._own.pipe)["scheduler"] = copy.deepcopy(self.pipe.scheduler)
        return self._own.pipe

    def _new_copy(self) -> object:
        pipe = copy.copy(self.pipe)
        tokenizers = {name: part for name, part in pipe.components.items() if name.startswith("tokenizer")}
        # set past the pipeline's own setter, which would write into the configuration that all copies share
        vars(pipe).update({name: copy.deepcopy(part) for name, part in tokenizers.items()})
        vars(pipe).update({name: _twin(self.pipe.components[name], joint) for name, joint in self._joint.items()})
        return pipe

    def _call(self, request: PipelineRequest, args: tuple, kwargs: dict) -> None:
        if not request.set_running_or_notify_cancel():
            return
        self._own.request = request
        with self._lock:
            self._report.begun(time.perf_counter() - request.submitted)
        try:
            try:
                result = self._copy()(*args, **kwargs)
            finally:
                for joint in self._joint.values():
                    joint.leave()
        except BaseException as error:
            request.set_exception(error)
        else:
            request.set_result(result)


def _twin(module: nn.Module, forward: JointCalls) -> nn.Module:
    """A module with the same parameters and attributes whose forward is another; hooks stay with the module itself."""
    twin = copy.copy(module)
    vars(twin).update({"forward": forward, **{name: OrderedDict() for name in _HOOKS}})
    return twin
