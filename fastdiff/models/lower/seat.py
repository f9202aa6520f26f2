"""The seat of a module's forward: hooks of other libraries wrap it before or after us, and must go on doing so."""

import inspect
from collections.abc import Callable, Iterator

from torch import nn

from fastdiff.models.lower.record import UnsupportedError


class Seat:
    """Stands in for the forward of a module and runs `run` instead, until it is left.

    Who took hold of it meanwhile (a hook, a compiler) reaches the module's own forward from then on.
    """

    __slots__ = ("module", "run")

    def __init__(self, module: nn.Module, run: Callable) -> None:
        self.module, self.run = module, run

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_own(self.module))

    def take(self) -> None:
        """Sits down in the place of the module's own forward, inside of hooks that are there already.

        Raises UnsupportedError where something else than a known kind of hook has replaced the forward.
        """
        for holder, name in _places(self.module):
            if getattr(holder[name], "__func__", None) is type(self.module).forward:
                holder[name] = self
                return
        if "forward" in self.module.__dict__:
            raise UnsupportedError(f"the forward of {type(self.module).__name__} was replaced by other code")
        self.module.__dict__["forward"] = self

    def leave(self) -> None:
        """Gives the module its own forward back, inside of hooks that came before or after."""
        self.run = _own(self.module)
        for holder, name in list(_places(self.module)):
            if holder[name] is self and holder is self.module.__dict__ and name == "forward":
                del holder[name]
            elif holder[name] is self:
                holder[name] = self.run


def _own(module: nn.Module) -> Callable:
    return type(module).forward.__get__(module)


def _places(module: nn.Module) -> Iterator[tuple[dict, str]]:
    """What may hold a forward: the module, the registry of diffusers' hooks, and the hook of `accelerate`."""
    registry = module.__dict__.get("_diffusers_hook")
    for holder in (module.__dict__, *map(vars, getattr(registry, "_fn_refs", ()))):
        for name in ("forward", "original_forward", "_old_forward"):
            if holder.get(name) is not None:
                yield holder, name
