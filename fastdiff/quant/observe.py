"""Runs the network over calibration samples and watches what enters its layers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastdiff.quant.calibration import CalibrationSet

Tensor = torch.Tensor


class _Enough(Exception):
    """Everything that is watched has been seen: the rest of the network need not run."""


def run(net: nn.Module, data: CalibrationSet, batch: int = 32) -> None:
    """Calls the network with all samples, in order."""
    data = data.to(next(net.parameters(), torch.zeros(())).device)
    with torch.no_grad():
        for x, t, cond in data.batches(batch):
            with contextlib.suppress(_Enough):
                net(x, t, **cond)


@contextlib.contextmanager
def watching(net: nn.Module, watchers: dict[str, Callable[[Tensor], Any]]) -> Iterator[None]:
    """While the context is open, calls watchers[name](input) before every forward of the module `name`."""
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, see=see: see(args[0]) and None)
        for name, see in watchers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def stopping_after(net: nn.Module, name: str) -> Iterator[None]:
    """While the context is open, `run` ends every forward when the module `name` has run."""

    def stop(*_: Any) -> None:
        raise _Enough

    handle = net.get_submodule(name).register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def capture(net: nn.Module, name: str, data: CalibrationSet) -> tuple[list[tuple], list[dict], list[Tensor]]:
    """Arguments, keyword arguments and results of the module `name`, one entry per batch."""
    args, kwargs, outs = [], [], []

    def keep(_: nn.Module, a: tuple, k: dict, out: Tensor) -> None:
        args.append(_copied(a))
        kwargs.append(_copied(k))
        outs.append(_copied(out))
        raise _Enough

    handle = net.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    try:
        run(net, data)
    finally:
        handle.remove()
    return args, kwargs, outs


def execution_order(net: nn.Module, names: list[str], data: CalibrationSet) -> list[str]:
    """The modules in the order of their first forward; those that never run come last."""
    seen: list[str] = []
    watchers = {name: (lambda _, name=name: seen.append(name)) for name in names}
    sample = CalibrationSet(*_first(data))
    with watching(net, watchers):
        run(net, sample)
    first = list(dict.fromkeys(seen))
    return first + [name for name in names if name not in first]


def _first(data: CalibrationSet) -> tuple:
    x, t, cond = data.rows(slice(0, 1))
    return x, t, cond


def _copied(value: Any) -> Any:
    """A copy of nested tensors; what a block changes in place must not reach what was captured."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)(_copied(item) for item in value)
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
