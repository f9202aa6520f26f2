"""Calls of a denoiser that threads make at the same time, made as one call with all their rows."""

import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdiff.pipeline.paired_calls import SHARED, STATES

Tensor = torch.Tensor
_PATIENCE = 0.1  # of the time of a call: how long one waits for those who are between two calls


class JointCalls:
    """Stands in for a denoiser's forward in several threads. Whoever finds the denoiser free calls it for all who wait.

    Calls join where their arguments are alike: tensors with a row per sample have the same other sizes and dtypes, everything
    else is equal. Timesteps are one per sample.

    module  the denoiser itself
    before  called in the thread of a call before it waits; what it raises is raised there
    most    rows of a joint call; one that has more goes alone
    note    told of every joint call how many calls it stands for, its rows and its seconds
    """

    def __init__(self, module: nn.Module, before: Callable[[], None], most: int, note: Callable) -> None:
        self._module, self._before, self._most, self._note = module, before, most, note
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._turn = threading.Lock()  # of the denoiser
        self._changed = threading.Condition()  # guards what follows
        self._waiting: list[_Call] = []
        self._callers: set[int] = set()
        self._seconds = 0.0  # that the last call took

    def __call__(self, *args, **kwargs):
        self._before()
        call = _Call(dict(zip(self._names, args, strict=False)) | kwargs)
        with self._changed:
            self._callers.add(threading.get_ident())
            self._waiting.append(call)
            self._changed.notify_all()
        with self._turn:
            while not call.done():
                self._run(self._together())
        return call.result()

    def leave(self) -> None:
        """Notes that this thread is between calls of the pipeline: nobody needs to wait for it."""
        with self._changed:
            self._callers.discard(threading.get_ident())
            self._changed.notify_all()

    def _together(self) -> list["_Call"]:
        """The call that has waited longest and those that can join it, as soon as there is nobody to wait for."""
        with self._changed:
            everybody = lambda: len(self._waiting) >= len(self._callers)
            self._changed.wait_for(everybody, _PATIENCE * self._seconds)
            first, rows, together = self._waiting[0], 0, []
            for call in self._waiting:
                if call is first or (rows + call.rows <= self._most and call.joins(first)):
                    together.append(call)
                    rows += call.rows
            self._waiting = [call for call in self._waiting if call not in together]
        return together

    def _run(self, calls: list["_Call"]) -> None:
        start = time.perf_counter()
        try:
            out = self._module(**_Call.merged(calls))
        except Exception as error:
            if len(calls) > 1:  # one of them is to blame
                for call in calls:
                    self._run([call])
            else:
                calls[0].set_exception(error)
            return
        self._seconds = time.perf_counter() - start
        rows = sum(call.rows for call in calls)
        self._note(len(calls), rows, self._seconds)
        begin = 0
        for call in calls:
            part = slice(begin, begin + call.rows)
            call.set_result(_mapped(out, lambda value, part=part: value[part] if torch.is_tensor(value) else value))
            begin += call.rows


class _Call(Future):
    """A call that waits to be made; its result is that of its own rows."""

    def __init__(self, arguments: dict) -> None:
        super().__init__()
        state = next(arguments[name] for name in STATES if name in arguments)
        self.rows = len(state)
        t = torch.as_tensor(arguments["timestep"], device=state.device)
        names = sorted(arguments)
        given = arguments | {"timestep": t.flatten().expand(self.rows)}
        self.values, self.structure = tree_flatten([given[name] for name in names])
        alone = [name in SHARED for name in names for _ in tree_flatten(given[name])[0]]
        self._of_rows = [
            torch.is_tensor(value) and value.dim() > 0 and len(value) == self.rows and not shared
            for value, shared in zip(self.values, alone, strict=True)
        ]
        self._names = names

    def joins(self, other: "_Call") -> bool:
        """Whether both can be made as one."""
        if (self._names, self.structure, self._of_rows) != (other._names, other.structure, other._of_rows):
            return False
        return all(map(_alike, self.values, other.values, self._of_rows))

    @staticmethod
    def merged(calls: list["_Call"]) -> dict:
        """The arguments of several calls as those of one."""
        first = calls[0]
        values = [
            torch.cat([call.values[k] for call in calls]) if of_rows and len(calls) > 1 else first.values[k]
            for k, of_rows in enumerate(first._of_rows)
        ]
        return dict(zip(first._names, tree_unflatten(values, first.structure), strict=True))


def _alike(one: object, other: object, of_rows: bool) -> bool:
    if one is other:
        return True
    if not (torch.is_tensor(one) and torch.is_tensor(other)):
        return type(one) is type(other) and one == other
    if (one.dtype, one.device) != (other.dtype, other.device):
        return False
    return one.shape[1:] == other.shape[1:] if of_rows else torch.equal(one, other)


def _mapped(out: object, make: Callable[[object], object]) -> object:
    """What a denoiser returned, a tuple or one of diffusers' outputs, with its values made anew."""
    if isinstance(out, tuple):
        return tuple(map(make, out))
    return type(out)(**{name: make(value) for name, value in out.items()})
