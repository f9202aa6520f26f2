"""Whether ours or torch's own computes a layer of a module that is walked."""

import time
from collections.abc import Callable

import torch

Tensor = torch.Tensor
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # others may have no memory of their own
_ROUNDS = 5  # of each contender


def servable(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or any(t.device.type != "cpu" or t.dtype not in _FLOATS for t in tensors):
        return False
    if any(type(t) not in _PLAIN for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) and all(t.numel() for t in tensors)


class Always:
    """Ours, whatever it takes."""

    ratios: tuple[float, ...] = ()
    called = False

    def is_ours(self, key: tuple, ours: Callable[[], Tensor], own: Callable[[], Tensor]) -> bool:
        self.called = True
        return True


class Timed:
    """Which of two ways to compute the same thing is faster, found on the first input of each shape."""

    def __init__(self) -> None:
        self._ours: dict[tuple, bool] = {}
        self.ratios: list[float] = []

    @property
    def called(self) -> bool:
        return bool(self._ours)

    def is_ours(self, key: tuple, ours: Callable[[], Tensor], own: Callable[[], Tensor]) -> bool:
        if key not in self._ours:
            seconds = {run: [] for run in (ours, own)}
            for run in (ours, own) * _ROUNDS:
                start = time.perf_counter()
                run()
                seconds[run].append(time.perf_counter() - start)
            ratio = min(seconds[own]) / min(seconds[ours])
            self.ratios.append(ratio)
            self._ours[key] = ratio > 1
        return self._ours[key]


def slower_reason(choice: Always | Timed) -> str:
    """Why torch's own runs, or nothing."""
    worst = min(choice.ratios, default=2.0)
    return "" if worst > 1 else f"ours takes {1 / worst:.2f}x the time"
