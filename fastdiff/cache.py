"""The feature cache: what the inner blocks of a network contributed is used again while it changes little."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fastdiff.ops.gram import gram

Tensor = torch.Tensor
_RUNS = 4  # requests that take turns on one network, such as the branches of guidance in calls of their own


@dataclass(frozen=True)
class Cache:
    """How much error the reuse of features may cost. Reuse is off unless a network is given one of these.

    budget       largest relative L2 error of the features that reuse may cause in a call, as estimated for each sample
    first        calls at the start of every run that compute everything
    consecutive  at most so many calls in a row reuse

    Between neighbouring steps the outer layers change a little and the inner ones follow (Ma et al. 2023, DeepCache;
    first-block caches of DiTs). Published caches reuse below a threshold on the outer change, to be found by trial for each
    model. Here every call that computes tells by how much the inner features really moved per outer change, in that
    sample and at that noise level, so that the estimate, and the budget, are errors of features.
    """

    budget: float = 0.1
    first: int = 2
    consecutive: int = 3

    def __post_init__(self):
        if not (math.isfinite(self.budget) and self.budget >= 0):
            raise ValueError(f"Cache: budget must be a finite number >= 0, got {self.budget!r}")
        if self.first < 2:
            raise ValueError(f"Cache: first must be at least 2 (two calls show how features move), got {self.first!r}")
        if self.consecutive < 1:
            raise ValueError(f"Cache: consecutive must be at least 1, got {self.consecutive!r}")


@dataclass
class Reuse:
    """What a cache did, over all samples of all calls.

    computed, reused  samples
    worst_estimate    largest estimated error that was accepted
    measured          mean error that one more reuse would have had, wherever features were computed again; None before
    spent_s, saved_s  seconds that inner blocks took, and would have taken for the samples that reused, at their best pace
    """

    computed: int = 0
    reused: int = 0
    worst_estimate: float = 0.0
    measured: float | None = None
    spent_s: float = 0.0
    _pace_s: float = math.inf
    _errors: int = 0

    @property
    def saved_s(self) -> float:
        return self._pace_s * self.reused if self.reused else 0.0

    def compute(self, samples: int, seconds: float) -> None:
        """Counts samples that were computed."""
        self.computed += samples
        self.spent_s += seconds
        self._pace_s = min(self._pace_s, seconds / samples)

    def measure(self, errors: np.ndarray) -> None:
        """Adds measured errors to their mean."""
        if errors.size:
            total = (self.measured or 0.0) * self._errors + float(errors.sum())
            self._errors += errors.size
            self.measured = total / self._errors

    def __str__(self) -> str:
        calls = self.computed + self.reused
        if not calls:
            return "feature cache: not used yet"
        share = f"feature cache: inner blocks reused for {self.reused} of {calls} samples"
        if not self.reused:
            return share
        speed = f"{1 + self.saved_s / self.spent_s:.2f}x as fast, {self.saved_s:.3g} s saved"
        error = f"features off by {self.worst_estimate:.3g} at most as estimated"
        measured = "" if self.measured is None else f", one reuse more by {self.measured:.3g} on average as measured"
        return f"{share}, {speed}; {error}{measured}"


@dataclass
class _Run:
    """What is known of the samples of one run: the features of their last computation, and how they moved.

    gain  error of reuse per change of the outer features, from the last two computations
    """

    conditioning: tuple[Tensor, ...]
    outer: Tensor
    inner: Tensor
    calls: np.ndarray
    reuses: np.ndarray
    gain: np.ndarray
    time: np.ndarray
    direction: np.ndarray = field(init=False)

    def __post_init__(self):
        self.direction = np.zeros_like(self.time)

    def move(self, time: np.ndarray) -> None:
        """Goes on to the next times; samples whose time turns around have begun another run."""
        step = np.sign(time - self.time)
        turned = step * self.direction < 0
        self.calls[turned], self.gain[turned] = 0, np.inf
        self.direction = np.where(turned, 0, np.where(step == 0, self.direction, step))
        self.time = time


class FeatureCache:
    """Decides, sample by sample, whether the inner blocks of a network run or their last features serve again.

    A sample's decisions depend on that sample only. Runs are told apart by their conditioning, and a run ends where
    the time turns around, so that requests one after the other never share features.
    """

    def __init__(self, settings: Cache) -> None:
        self.settings = settings
        self.reuse = Reuse()
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self._made = 0

    def clear(self) -> None:
        """Forgets all features, at the start of a run or when weights have changed."""
        self._runs.clear()

    def serve(
        self,
        outer: Tensor,
        t: Tensor,
        conditioning: tuple[Tensor, ...],
        compute: Callable[[Tensor | None], Tensor],
        adds: bool,
    ) -> Tensor:
        """The result of the inner blocks for each sample, computed or used again.

        outer         [B, ...] what the outer layers hand to the inner blocks
        t             [B] model time
        conditioning  tensors of B rows that stay the same during a run
        compute       from an index [R] int64 of samples, or None for all, to the inner result [R, ...]
        adds          the inner blocks add to `outer` (their result has its shape), so that what they added is kept
        """
        times = t.detach().double().cpu().numpy()
        run = self._find(outer, conditioning)
        if run is None:
            return self._begin(outer, times, conditioning, compute, adds)
        run.move(times)
        change = _relative(outer, run.outer, outer)
        with np.errstate(invalid="ignore"):
            estimate = np.where(change == 0, 0, run.gain * change)
        settings = self.settings
        again = (run.calls >= settings.first) & (run.reuses < settings.consecutive) & (estimate <= settings.budget)
        served = outer + run.inner if adds else run.inner.clone()
        self.reuse.reused += int(again.sum())
        self.reuse.worst_estimate = max(self.reuse.worst_estimate, *estimate[again], 0.0)
        run.calls += 1
        run.reuses = np.where(again, run.reuses + 1, 0)
        if not again.all():
            self._renew(run, np.flatnonzero(~again), outer, served, change, compute, adds)
        return served

    def _find(self, outer: Tensor, conditioning: tuple[Tensor, ...]) -> _Run | None:
        for key, run in reversed(self._runs.items()):
            alike = run.outer.shape == outer.shape and len(run.conditioning) == len(conditioning)
            if alike and all(torch.equal(a, b) for a, b in zip(run.conditioning, conditioning, strict=True)):
                self._runs.move_to_end(key)
                return run
        return None

    def _begin(self, outer, times, conditioning, compute, adds) -> Tensor:
        inner = self._computed(compute, None, len(times))
        kept = tuple(c.clone() for c in conditioning)
        ones = np.ones(len(times), dtype=np.int64)
        added = inner - outer if adds else inner.clone()
        run = _Run(kept, outer.clone(), added, ones, 0 * ones, np.full(len(times), np.inf), times)
        self._made += 1
        self._runs[self._made] = run
        if len(self._runs) > _RUNS:
            self._runs.popitem(last=False)
        return inner

    def _renew(self, run: _Run, rows: np.ndarray, outer, served, change, compute, adds) -> None:
        """Computes the samples `rows`, learns from what reuse would have given, and writes them to `served`."""
        index = torch.from_numpy(rows).to(outer.device)
        inner = self._computed(compute, None if len(rows) == len(change) else index, len(rows))
        error = _relative(inner, served[index], inner)
        begun = run.calls[rows] > 1  # others have features of another run
        self.reuse.measure(error[begun])
        moved = np.where(begun & (change[rows] > 0), error / np.maximum(change[rows], 1e-30), np.inf)
        earlier = run.gain[rows]
        run.gain[rows] = np.where(np.isfinite(earlier), np.maximum(moved, earlier / 2), moved)
        run.outer[index] = outer[index]
        run.inner[index] = inner - outer[index] if adds else inner
        served[index] = inner

    def _computed(self, compute: Callable, index: Tensor | None, rows: int) -> Tensor:
        start = time.perf_counter()
        inner = compute(index)
        self.reuse.compute(rows, time.perf_counter() - start)
        return inner


def _relative(a: Tensor, b: Tensor, of: Tensor) -> np.ndarray:
    """|a - b| / |of| for each sample, in a fixed order of summation."""
    products = gram([(a - b), of])
    norms = products.diagonal(dim1=1, dim2=2)[:, :2].sqrt().cpu().numpy()
    return np.divide(norms[:, 0], norms[:, 1], out=np.full(len(norms), np.inf), where=norms[:, 1] > 0)
