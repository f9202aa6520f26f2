"""Adaptive guidance in pipelines: negative halves of a denoiser's batch that need not be evaluated."""

import inspect
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from fastdiff.steering.adaptive_guidance import AdaptiveGuidance, compared

Tensor = torch.Tensor
STATES, _CONDITIONS = ("sample", "hidden_states"), ("encoder_hidden_states", "class_labels")
SHARED = ("img_ids", "txt_ids", "image_rotary_emb")  # tensors without samples
_CONDITIONAL_FIRST = ("DiTTransformer2DModel",)


class PairedCalls:
    """Runs a denoiser that pipelines call with both branches of guidance in one batch: the same states twice.

    Samples whose branches agree (`AdaptiveGuidance`) keep the conditional branch only, whose result then stands for both, so
    that the pipeline's guidance changes nothing. A run begins where the conditioning is another or the time goes up.

    evaluated, left_out  negative evaluations that were made, and that were not
    apart                largest relative L2 distance of two branches when the negative one was given up: what each further
                         prediction loses is about this, times the guidance scale less one
    """

    def __init__(self, module: nn.Module, settings: AdaptiveGuidance) -> None:
        self._settings = settings
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._conditional = 0 if type(module).__name__ in _CONDITIONAL_FIRST else 1
        self.evaluated = self.left_out = 0
        self.apart = 0.0
        self._spent_s, self._pace_s, self._rows_run = 0.0, float("inf"), 0
        self._lock = threading.Lock()
        self._condition: object = None
        self._time, self._calls = float("-inf"), 0
        self._closed = torch.zeros(0, dtype=torch.bool)

    def around(self, run: Callable) -> Callable:
        """The denoiser's forward `run` with this around it."""
        self.run = run
        return self

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.run(*args, **kwargs)
        call = dict(zip(self._names, args, strict=False)) | kwargs
        state = next((call[name] for name in STATES if name in call), None)
        if not _is_paired(state):
            return self.run(*args, **kwargs)
        with self._lock:
            self._follow(call, len(state) // 2)
            rows = self._rows()
            start = time.perf_counter()
            out = self.run(**(call if rows is None else _cut(call, rows, len(state))))
            self._clock(time.perf_counter() - start, len(state), rows is None)
            result = out[0] if rows is None else self._both(out[0], rows, len(state))
            self._judge(result, state.shape[1])
        return (result,) if isinstance(out, tuple) else type(out)(sample=result)

    def __str__(self) -> str:
        share = f"{self.left_out} of {self.evaluated + self.left_out} negative evaluations left out"
        if not self.left_out:
            return f"adaptive guidance: {share}"
        speed = self._pace_s * self._rows_run / self._spent_s
        return f"adaptive guidance: {share}, {speed:.2f}x as fast; branches apart by {self.apart:.3g} at most when they ended"

    def _clock(self, seconds: float, rows: int, whole: bool) -> None:
        """Counts what a call took, and the best pace of those that evaluate every row."""
        self._spent_s += seconds
        self._rows_run += rows
        if whole:
            self._pace_s = min(self._pace_s, seconds / rows)

    def _follow(self, call: dict, samples: int) -> None:
        """Begins another run where this call belongs to one."""
        time = call.get("timestep")
        time = float(time.flatten()[0] if isinstance(time, Tensor) else time)
        condition = next((call[name] for name in _CONDITIONS if name in call), None)
        if condition is not self._condition or time > self._time or len(self._closed) != samples:
            self._closed, self._calls = torch.zeros(samples, dtype=torch.bool), 0
        self._condition, self._time = condition, time
        self._calls += 1

    def _rows(self) -> Tensor | None:
        """Which rows of the batch are evaluated; None for all."""
        left_out = int(self._closed.sum())
        self.left_out += left_out
        self.evaluated += len(self._closed) - left_out
        if not left_out:
            return None
        kept = torch.ones(2, len(self._closed), dtype=torch.bool)
        kept[1 - self._conditional] = ~self._closed
        return kept.flatten().nonzero().flatten()

    def _both(self, result: Tensor, rows: Tensor, size: int) -> Tensor:
        """The whole batch from the rows that were evaluated."""
        whole = result.new_empty(size, *result.shape[1:])
        whole[rows.to(result.device)] = result
        halves = whole.unflatten(0, (2, -1))
        closed = self._closed.to(result.device)
        halves[1 - self._conditional, closed] = halves[self._conditional, closed]
        return whole

    def _judge(self, result: Tensor, channels: int) -> None:
        """Ends the guidance of samples whose branches agree; learned variances have no say in it."""
        if self._calls > self._settings.first:
            first, second = result.unflatten(0, (2, -1))
            if result.shape[1] == 2 * channels:
                first, second = first[:, :channels], second[:, :channels]
            cosine, apart = compared(*((first, second) if self._conditional else (second, first)))
            ends = torch.from_numpy(cosine >= self._settings.threshold) & ~self._closed
            self.apart = max(self.apart, *apart[ends.numpy()], 0.0)
            self._closed = self._closed | ends


def _is_paired(state: object) -> bool:
    if not isinstance(state, Tensor) or len(state) < 2 or len(state) % 2:
        return False
    return torch.equal(*state.unflatten(0, (2, -1)))


def _cut(value: object, rows: Tensor, size: int) -> object:
    """The arguments of a call for some rows of its batch."""
    if isinstance(value, dict):
        return {key: inner if key in SHARED else _cut(inner, rows, size) for key, inner in value.items()}
    if isinstance(value, Tensor) and value.dim() and len(value) == size:
        return value.index_select(0, rows.to(value.device))
    return value
