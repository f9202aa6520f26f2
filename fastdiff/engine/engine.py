"""Engine: continuous batching of sampling requests, step by step."""

import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch.utils._pytree import tree_map

from fastdiff.engine.report import EngineReport
from fastdiff.engine.request import Request
from fastdiff.engine.rows import Rows
from fastdiff.initial import endpoints
from fastdiff.sampler import Cancelled, Sampler, State

_OWN = ("hooks", "graph", "device")  # settings of a run that rows of one batch cannot each have


class Engine:
    """Serves requests that arrive at any time: those that are alike share every call of the network.

    A request may have any solver, number of steps, seeds and guidance. It joins at the next step when there is room for its
    samples, first come first served, and each sample leaves as soon as it has finished. Requests of another shape, state
    dtype or structure of conditioning run in calls of their own, in turns.

    sampler    the network, its prediction, its process and `micro_batch`
    max_rows   samples in flight; a call of the network has more rows where guidance needs two branches
    max_queue  requests that may wait; one more raises queue.Full. None: any number
    device     where to sample; that of the network's parameters when None

    `request.result()` has the bits of `sampler.sample` with the same arguments if the rows of a call cannot influence each
    other: always with `micro_batch=1`, and with networks that are accelerated with `deterministic="batch"`. Most networks
    choose their kernels by the size of the batch, which changes the last bits. micro_batch=1 costs what the network gains
    from a batch. A `fastdiff.Cache` in the network is emptied whenever a request joins, so it makes results depend on others.
    A network that prepares itself for each number of rows (accelerated, compiled) meets few of them with a small micro_batch.

    One thread runs the network, in the context (as `fastdiff.backend`) in which the engine was made. Use it in a `with`
    statement, or call `shutdown`.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        max_rows: int = 16,
        max_queue: int | None = None,
        device: torch.device | str | None = None,
    ):
        if not isinstance(sampler, Sampler):
            raise TypeError(f"Engine: a fastdiff.Sampler expected, got {type(sampler).__name__}; give Sampler(net)")
        for name, value in (("max_rows", max_rows), ("max_queue", max_queue)):
            if not (isinstance(value, int) and value >= 1) and not (name == "max_queue" and value is None):
                raise ValueError(f"Engine: {name} must be an integer >= 1, got {value!r}")
        self.sampler, self.max_rows, self.max_queue, self.device = sampler, max_rows, max_queue, device
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Request] = deque()
        self._open: dict[Request, None] = {}  # not done, in the order of their coming
        self._closed = False
        self._report = EngineReport()
        self._groups: list[Rows] = []  # the worker's own
        context = contextvars.copy_context()
        self._worker = threading.Thread(target=context.run, args=(self._work,), name="fastdiff.Engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.shutdown(cancel=kind is not None)

    def submit(
        self,
        shape: Sequence[int] | None = None,
        *,
        x: State | None = None,
        cond: Mapping | None = None,
        negative: Mapping | None = None,
        seed: int | Sequence[int] = 0,
        **settings,
    ) -> Request:
        """Queues a request and returns its handle at once. Arguments are those of `Sampler.sample`, checked here.

        shape  [B, ...]: the B samples of a request join together, and leave one by one

        Raises ValueError or TypeError for bad arguments, queue.Full when `max_queue` requests wait, RuntimeError after
        `shutdown`. Hooks, graphs and a device of its own need `Sampler.sample`.
        """
        for name in _OWN:
            if name in settings:
                raise ValueError(f"Engine: {name} cannot be set per request; use Sampler.sample")
        settings |= {"device": self.device}
        x, aux = (tree_map(_copy, value) for value in (x, settings.get("aux")))
        arguments = self.sampler.arguments(shape, x, cond, negative, seed, settings)
        start, plan = arguments.start, arguments.plan
        if not 1 <= plan.batch <= self.max_rows:
            raise ValueError(f"Engine: a request must have 1 to {self.max_rows} samples (max_rows), got {plan.batch}")
        if start.given is not None and not all(leaf.dtype.is_floating_point for leaf in start.given):
            raise TypeError("Engine: x must be floating point")
        known = endpoints(aux, start.shapes, arguments.options.dtype, start.seed.device, plan)
        request = Request(arguments, known, self._withdraw)
        with self._changed:
            if self._closed:
                raise RuntimeError("Engine: it has been shut down; make another one")
            if self.max_queue is not None and len(self._waiting) >= self.max_queue:
                raise queue.Full(f"Engine: {len(self._waiting)} requests wait (max_queue); try again later")
            self._waiting.append(request)
            self._open[request] = None
            self._changed.notify()
        return request

    def report(self) -> EngineReport:
        """What has been done so far, and what waits and runs now."""
        with self._changed:
            return self._report.now(len(self._waiting), len(self._open) - len(self._waiting))

    def shutdown(self, wait: bool = True, cancel: bool = False) -> None:
        """Takes no more requests; with `cancel` withdraws all there are, and with `wait` returns when the rest is done."""
        with self._changed:
            self._closed = True
            pending = list(self._open)
            self._changed.notify()
        if cancel:
            for request in pending:
                request.cancel()
        if wait and threading.current_thread() is not self._worker:
            self._worker.join()

    def _withdraw(self, request: Request) -> bool:
        with self._changed:
            if request not in self._open:
                return False
            request.withdrawn = True
            waiting = request in self._waiting
            if waiting:
                self._waiting.remove(request)
        if waiting:
            self._settle(request)
        return True

    def _settle(self, request: Request, error: BaseException | None = None) -> None:
        """Hands over what became of a request."""
        error = error or request.error()
        with self._changed:
            if error is None and request.withdrawn:
                error = Cancelled(request.preview())
            self._open.pop(request, None)
            self._report.settled(error)
        if error is None:
            request.set_result(request.state())
        else:
            request.set_exception(error)

    def _work(self) -> None:
        """The worker: lets requests in and steps every group in turn, until there is nothing left after `shutdown`."""
        try:
            with torch.no_grad():
                while self._exchange():
                    for group in [*self._groups]:
                        self._step(group, [*group.requests])
        except BaseException as error:  # nobody may wait for ever for a worker that is gone
            with self._changed:
                self._closed, pending = True, list(self._open)
                self._waiting.clear()
            for request in pending:
                self._settle(request, error)
            raise

    def _exchange(self) -> bool:
        """Removes what was withdrawn, and lets the first requests in as long as there is room. False at the end."""
        for group in [*self._groups]:
            for request in [*group.requests]:
                if request.withdrawn:
                    self._remove(group, request)
        with self._changed:
            while not self._waiting and not self._groups:
                if self._closed:
                    return False
                self._changed.wait()
            room, coming = self.max_rows - sum(group.in_use for group in self._groups), []
            while self._waiting and self._waiting[0].plan.batch <= room:
                coming.append(self._waiting.popleft())
                room -= coming[-1].plan.batch
                self._report.begun(time.perf_counter() - coming[-1].submitted)
        for request in coming:
            self._join(request)
        return True

    def _join(self, request: Request) -> None:
        request.set_running_or_notify_cancel()
        if request.withdrawn:
            return self._settle(request)
        try:
            group = next((group for group in self._groups if group.kind == request.kind), None)
            group = group or Rows(self.sampler, request.kind, self.max_rows)
            group.join(request)
        except Exception as error:
            return self._settle(request, error)
        if group not in self._groups:
            self._groups.append(group)

    def _step(self, group: Rows, requests: list[Request]) -> None:
        begin = time.perf_counter()
        try:
            rows, evaluations = group.step(requests)
        except Exception as error:
            if len(requests) > 1:  # one of them is to blame, and the others go on
                for request in requests:
                    self._step(group, [request])
            else:
                self._remove(group, requests[0], error)
            return
        with self._changed:
            self._report.stepped(rows, evaluations, time.perf_counter() - begin)
        for request in requests:
            if request.tick == request.plan.ticks:
                self._remove(group, request)

    def _remove(self, group: Rows, request: Request, error: Exception | None = None) -> None:
        group.leave(request)
        if not group.requests:
            self._groups.remove(group)
        self._settle(request, error)


def _copy(value: object) -> object:
    """A copy of a tensor: what a request was given may change before it joins."""
    return value.clone() if isinstance(value, torch.Tensor) else value
