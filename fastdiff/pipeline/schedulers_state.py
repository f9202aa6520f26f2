"""Reading a scheduler's attributes: which are tensors of a run, and which settings decide what a step computes."""

from collections.abc import Mapping

import numpy as np
import torch

from fastdiff.pipeline.schedulers_probe import Ref

PRIVATE = "_fastdiff"
_SIMPLE = (int, float, bool, str, type(None), torch.dtype)
TRIMMED = {"ets": 4}  # lists that grow for ever though only their end is read


class Attributes:
    """The attributes of one scheduler, as seen last.

    times  what every entry of `timesteps` is, on the host
    """

    def __init__(self):
        self.times: list = []
        self._first, self._stride, self._count = 0, 1, 0
        self._dtype = torch.int64
        self._copies: dict[int, tuple[torch.Tensor, int, torch.Tensor, object]] = {}
        self._watched: list[tuple[torch.Tensor, int]] = []

    def read(self, attributes: Mapping[str, object], shape: torch.Size) -> tuple[tuple, dict, list, tuple]:
        """(key, state, tensors, tables): equal keys mean equal steps; `state` has references to `tensors` by place."""
        key, tables, state, tensors = [], [], {}, []
        self._watched.clear()
        for name, value in attributes.items():
            if name == PRIVATE:
                continue
            state[name] = self._value(name, value, shape, tensors, key, tables)
        self._note_times(attributes.get("timesteps"))
        return (tuple(key), tuple(tables)), state, tensors, tuple(tables)

    def _value(self, name, value, shape, tensors: list, key: list, tables: list) -> object:
        if isinstance(value, list) and any(isinstance(v, torch.Tensor) and v.shape == shape for v in value):
            value = value[-TRIMMED[name] :] if name in TRIMMED else value
            return [self._value(name, v, shape, tensors, key, tables) for v in value]
        if isinstance(value, torch.Tensor) and value.shape == shape:
            tensors.append(value)
            key.append((name, len(tensors)))
            return Ref(slot=len(tensors) - 1)
        if isinstance(value, torch.Tensor):
            host, mark = self._host(value)
            (key if value.dim() == 0 else tables).append((name, mark))
            return host
        if isinstance(value, list) and any(isinstance(v, torch.Tensor) for v in value):
            return [self._value(name, v, shape, tensors, key, tables) for v in value]
        key.append((name, _mark(value)))
        return list(value) if isinstance(value, list) else value

    def _host(self, tensor: torch.Tensor) -> tuple[torch.Tensor, object]:
        """A tensor on the CPU, and something equal for equal tensors; remembered as long as the tensor does not change."""
        found = self._copies.get(id(tensor))
        if found is None or found[0] is not tensor or found[1] != version(tensor):
            if len(self._copies) > 64:
                self._copies.clear()
            host = tensor.detach().cpu().clone()
            mark = (str(host.dtype), tuple(host.shape), host.contiguous().view(-1).numpy().tobytes())
            found = self._copies[id(tensor)] = (tensor, version(tensor), host, (hash(mark), mark[1]))
        if tensor.dim():
            self._watched.append(found[:2])
        return found[2], found[3]

    def edited(self) -> bool:
        """Whether a table was changed in place since it was read."""
        for tensor, seen in self._watched:
            if seen >= 0 and tensor._version != seen:
                return True
        return False

    def _note_times(self, timesteps: object) -> None:
        self.times, self._count = [], 0
        if isinstance(timesteps, torch.Tensor) and timesteps.dim() == 1 and timesteps.is_contiguous():
            self.times, self._dtype = self._host(timesteps)[0].tolist(), timesteps.dtype
            self._first, self._stride, self._count = timesteps.data_ptr(), timesteps.element_size(), len(timesteps)

    def time(self, timestep: object) -> object:
        """A timestep argument as a dictionary key, without waiting for a device where it is an entry of `timesteps`."""
        if type(timestep) is not torch.Tensor:
            return type(timestep).__name__, timestep
        if timestep.dim() == 0:
            place, off = divmod(timestep.data_ptr() - self._first, self._stride)
            if 0 <= place < self._count and off == 0 and timestep.dtype is self._dtype:
                return self.times[place]
        value = timestep.item()
        return value if timestep.dtype is self._dtype and value in self.times else (str(timestep.dtype), value)

    def as_argument(self, timestep: object) -> object:
        """A timestep argument as its own step sees it, on the CPU."""
        if type(timestep) is not torch.Tensor:
            return timestep
        return torch.tensor(timestep.item(), dtype=timestep.dtype)


def is_same(before: object, after: object) -> bool:
    """Whether setting an attribute changes nothing."""
    return before is after or (type(before) is type(after) and isinstance(before, _SIMPLE) and before == after)


def own(value: object) -> object:
    """A copy of a tensor or of a list with tensors; anything else as it is."""
    if isinstance(value, list):
        return [own(entry) for entry in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def version(tensor: torch.Tensor) -> int:
    """Counts the changes in place, or -1 where torch does not count them."""
    return -1 if tensor.is_inference() else tensor._version


def _mark(value: object) -> object:
    """Something equal where the value is equal."""
    if isinstance(value, _SIMPLE):
        return type(value).__name__, value
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, hash(value.tobytes())
    if isinstance(value, (list, tuple)):
        return tuple(map(_mark, value))
    return id(value), _Held(value)


class _Held:
    """Keeps an object alive, so that no other one can have its address; all are equal."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0
