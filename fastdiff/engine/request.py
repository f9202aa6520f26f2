"""Request: the handle of what was submitted to an engine."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_unflatten

from fastdiff.arguments import Arguments
from fastdiff.engine.kind import Kind
from fastdiff.loop import NonFiniteError, non_finite
from fastdiff.sampler import Cancelled, State, Step

if TYPE_CHECKING:
    from fastdiff.engine.rows import Rows


class Progress(NamedTuple):
    """Finished calls of the network, and how many there are to be."""

    done: int
    total: int


class Request(Future):
    """What `Engine.submit` returns: a `concurrent.futures.Future` of what `Sampler.sample` would return.

    `result(timeout)`, `exception(timeout)`, `done()`, `add_done_callback(fn)`, `concurrent.futures.wait` and
    `asyncio.wrap_future` work as for any future; callbacks run in the engine's thread. `result` raises Cancelled, with the
    last step, after `cancel()`, NonFiniteError where NaN or Inf appeared, and what the network raised.
    """

    def __init__(self, arguments: Arguments, aux: list[torch.Tensor | None], withdraw: Callable[["Request"], bool]):
        super().__init__()
        self.plan, self.structure, self.guard = arguments.plan, arguments.start.structure, arguments.options.guard
        self.kind = Kind.of(arguments)
        self.arguments: Arguments | None = arguments  # until it begins
        self.aux = aux
        self.submitted = time.perf_counter()
        self.withdrawn = False
        self.tick = 0
        self.ends = set((self.plan.rows >= 0).sum(axis=0).tolist())  # ticks after which samples have finished
        # of each sample: its place among the rows that run (-1: none), its state once it has left them, and the first call
        # after which it was not finite (-1: it was)
        self.places = np.full(arguments.plan.batch, -1)
        self.x: list[torch.Tensor] = []
        self.bad = torch.full(self.places.shape, -1, dtype=torch.int32, device=arguments.start.seed.device)
        self.asked: list[Future] = []  # by `denoised`, not yet answered
        self._rows: Rows | None = None
        self._withdraw = withdraw

    @property
    def progress(self) -> Progress:
        """How many calls of the network have been made, of how many."""
        return Progress(self.tick, self.plan.ticks)

    def preview(self) -> Step | None:
        """The last step, as `Sampler.step` yields it: a copy of the state, which still has noise. None before the first."""
        rows = self._rows
        return self.step([leaf.clone() for leaf in self.x]) if rows is None else rows.last_step(self)

    def denoised(self, timeout: float | None = None) -> State:
        """The clean data that the next call of the network predicts; waits for that call. Of finished samples, the result.

        Raises TimeoutError after `timeout` seconds, ValueError where a solver compiled from a scheduler does not know the
        data, and what `result` would raise.
        """
        if any(table.solver.history == "raw" for table in self.plan.tables):
            raise ValueError("denoised: a table compiled from a scheduler object does not know the predicted data")
        answer: Future = Future()
        self.asked.append(answer)
        self.add_done_callback(lambda _: self._answer_last(answer))
        return answer.result(timeout)

    def cancel(self) -> bool:
        """Withdraws the request: its rows leave before the next call. False where it is done already."""
        return self._withdraw(self)

    def cancelled(self) -> bool:
        """Whether it was withdrawn before it was done."""
        return self.done() and isinstance(self.exception(), Cancelled)

    def begin(self, rows: "Rows", places: np.ndarray, x: list[torch.Tensor]) -> None:
        """Notes where it runs."""
        self._rows, self.places, self.x = rows, places, x
        self.arguments, self.aux = None, []

    def answer(self, x: list[torch.Tensor]) -> None:
        """Gives predicted data to everybody who has asked."""
        while self.asked:
            self.asked.pop().set_result(self.state(x))

    def end(self) -> None:
        """Lets go of where it ran."""
        self._rows = None

    def step(self, x: list[torch.Tensor]) -> Step | None:
        """The last step with the given tensors as its state; None before the first."""
        tick = self.tick - 1
        return None if tick < 0 else Step(tick, self.state(x), torch.from_numpy(self.plan.finished(tick)))

    def _answer_last(self, answer: Future) -> None:
        if not answer.done() and self.exception() is not None:
            answer.set_exception(self.exception())
        elif not answer.done():
            answer.set_result(self.result())

    def state(self, x: list[torch.Tensor] | None = None) -> State:
        """The state of the samples as the tensor or pytree that the user knows."""
        return tree_unflatten(self.x if x is None else x, self.structure)

    def error(self) -> NonFiniteError | None:
        """The error that NaN or Inf in a sample that has left are, if the guard is on. Waits for the device."""
        bad = self.bad[self.bad >= 0].tolist() if self.guard else []
        return non_finite(min(bad), self.plan) if bad else None
