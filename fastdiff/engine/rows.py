"""Rows: requests that run together, in places that they take and leave."""

import threading

import numpy as np
import torch

from fastdiff.calls import ModelCalls
from fastdiff.conditioning import Conditioning
from fastdiff.engine.kind import Kind
from fastdiff.engine.places import Line, Places
from fastdiff.engine.request import Request
from fastdiff.initial import initial_leaves
from fastdiff.sampler import Sampler, Step

Tensor = torch.Tensor


class Rows:
    """Requests of one kind: they share every call of the network and every launch of the step kernel.

    A sample that has finished gives its place to the next one; a step leaves free places alone. Nothing but the network
    sees several samples at once, so a sample's bits are those of `Sampler.sample` for it alone wherever the network's are.

    most  how many places there may be
    """

    def __init__(self, sampler: Sampler, kind: Kind, most: int) -> None:
        self.kind, self.requests = kind, []
        self._sampler, self._most = sampler, most
        self._lock = threading.Lock()  # held while states change
        self._free: list[int] = []
        self._places: Places | None = None
        self._calls: ModelCalls | None = None

    def join(self, request: Request) -> None:
        """Takes a request in, at the noise it starts from."""
        given, plan, device = request.arguments, request.plan, request.arguments.start.seed.device
        model_dtype = given.options.resolve_model_dtype(self._sampler.net)
        leaves = initial_leaves(given.start, request.aux, plan, given.options.dtype, model_dtype)
        alone = self._model_calls(
            request, given.conditioning, torch.zeros(plan.branches, plan.batch, dtype=torch.int32)
        )
        alone.prepare(torch.from_numpy(plan.time).to(device, torch.float32), leaves)
        with self._lock:
            self._reserve(request, leaves)
            places = self._free[: plan.batch]
            at = torch.tensor(places, device=device)
            self._places.put(at, leaves, request.aux, given.conditioning.tensors, given.start.seed)
            self._calls.renew()
            self._free = self._free[plan.batch :]
            request.begin(self, np.array(places), [leaf.x for leaf in leaves])
            self.requests.append(request)

    @property
    def in_use(self) -> int:
        """How many places are taken."""
        return self._places.sizes[0] - len(self._free)

    def leave(self, request: Request) -> None:
        """Frees the places that a request still has."""
        with self._lock:
            self._take_out(request, np.ones(len(request.places), dtype=bool))
            self.requests.remove(request)
            request.end()

    def step(self, requests: list[Request]) -> tuple[int, int]:
        """One call of the network and one step of these requests; where the network raises, none of them has changed.

        Returns the number of samples and that of the rows that the network was given.
        """
        places = self._places
        line = Line.of(requests, places.sizes[0], places.sizes[2])
        self._calls.select(line.weights)
        time = torch.from_numpy(line.time).to(places.seed.device, torch.float32)
        outputs = self._calls.evaluate(places.leaves, time)
        with self._lock:
            asked = [request for request in requests if request.asked]
            if asked:
                data = places.denoised(line, outputs)
                for request in asked:
                    request.answer(self._of(request, data))
            places.step(line, outputs)
            for request in requests:
                request.tick += 1
                if request.tick in request.ends:
                    self._take_out(request, request.plan.finished(request.tick - 1))
        return int(np.count_nonzero(line.rows >= 0)), int(np.count_nonzero(line.weights))

    def last_step(self, request: Request) -> Step | None:
        """The last step of a request; its tensors are copies."""
        with self._lock:
            return request.step(self._of(request, [leaf.x for leaf in self._places.leaves]))

    def _take_out(self, request: Request, which: np.ndarray) -> None:
        """Copies samples of a request to where its result is gathered, and frees their places."""
        which = which & (request.places >= 0)
        if which.any():
            at = torch.from_numpy(request.places[which]).to(request.bad.device)
            request.bad[torch.from_numpy(which)] = self._places.bad[at]
            request.x = self._of(request, [leaf.x for leaf in self._places.leaves])
            self._free = sorted([*self._free, *request.places[which].tolist()])
            request.places[which] = -1

    def _of(self, request: Request, tensors: list[Tensor]) -> list[Tensor]:
        """The rows `[B, ...]` of a request among those of all places; of samples that have left, their last states."""
        live = request.places >= 0
        at, index = (torch.from_numpy(k).to(request.bad.device) for k in (request.places[live], np.flatnonzero(live)))
        return [x.index_copy(0, index, t[at]) for x, t in zip(request.x, tensors, strict=True)]

    def _reserve(self, request: Request, leaves: list) -> None:
        """Makes room where the request needs more places, history slots or branches than there are."""
        given, plan, old = request.arguments, request.plan, self._places
        R, S, J = old.sizes if old else (0, 0, 1)
        rows = R if plan.batch <= len(self._free) else min(max(R + plan.batch - len(self._free), 2 * R), self._most)
        sizes = rows, max(S, plan.slots), max(J, plan.branches)
        if sizes == (R, S, J):
            return
        fresh = (leaves, request.aux, given.conditioning.tensors)
        self._places = old.enlarged(*sizes) if old else Places(*fresh, *sizes)
        self._free += range(R, rows)
        conditioning = Conditioning(self._places.conditioning, given.conditioning.others)
        self._calls = self._model_calls(request, conditioning, self._places.source)

    def _model_calls(self, request: Request, conditioning: Conditioning, source: Tensor) -> ModelCalls:
        sampler = self._sampler
        return ModelCalls(sampler.net, conditioning, request.arguments.start.structure, sampler.micro_batch, source)
