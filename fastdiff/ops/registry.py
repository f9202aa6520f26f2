"""One op = one contract: a torch reference that is the documentation, and variants that are faster."""

import contextlib
import contextvars
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

OPS: dict[str, "Op"] = {}
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastdiff_backend", default=None)


@dataclass(frozen=True)
class Variant:
    """One way to run an op. `missing` says why it cannot run here at all, `refuse` why it cannot serve these arguments."""

    name: str
    run: Callable
    devices: tuple[str, ...]
    missing: Callable[[], str | None] | None = None
    refuse: Callable[..., str | None] | None = None

    def why_not(self, device: str, args: tuple) -> str | None:
        """The sentence that says why this variant cannot run on `device` with `args`, or None."""
        interpreted = self.name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device not in self.devices and not interpreted:
            return f"runs on {' and '.join(self.devices)}, not {device}"
        return (self.missing and self.missing()) or (self.refuse and self.refuse(*args)) or None


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces every op inside the block to one variant: "reference", "cpu", "onednn", "triton" or "cuda". It never falls back.

    Raises ValueError for a name that no op has; a call that the variant cannot serve raises RuntimeError.
    """
    _check_backend(name)
    token = _forced.set(name or "")
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The forced variant: the innermost `backend(...)`, else FASTDIFF_BACKEND, else None."""
    name = _forced.get()
    if name is None:
        name = os.environ.get("FASTDIFF_BACKEND") or ""
        _check_backend(name or None)
        _forced.set(name)
    return name or None


def _check_backend(name: str | None) -> None:
    known = {"reference"} | {variant.name for op in OPS.values() for variant in op.variants}
    if name is not None and name not in known:
        raise ValueError(f"backend: unknown name {name!r}; known are {', '.join(sorted(known))}")


@dataclass
class Op:
    """A callable op. Calls run the first variant that does not refuse; under torch.compile it is one graph node."""

    reference: Callable
    mutates: tuple[str, ...] = ()
    check: Callable[..., None] | None = None
    variants: list[Variant] = field(default_factory=list)
    samples: Callable | None = None
    _ready: dict[str, list[Variant]] = field(default_factory=dict)

    def __post_init__(self):
        self.name = self.reference.__name__
        self.__doc__ = self.reference.__doc__
        self.__name__ = self.name
        self.signature = inspect.signature(self.reference)
        self._mutated = [list(self.signature.parameters).index(name) for name in self.mutates]
        devices = ("cpu", "cuda", "meta")
        self.variants.append(Variant("reference", self._run_reference, devices))
        self._node = self._register_node()
        OPS[self.name] = self

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self._node(*args)
        if self.check is not None:
            self.check(*args)
        return self.pick(*args).run(*args)

    def variant(self, name: str, devices: tuple[str, ...], missing=None, refuse=None) -> Callable:
        """Registers a way to run the op. Order of registration is the order of preference; the reference stays last."""

        def register(run: Callable) -> Callable:
            self.variants.insert(len(self.variants) - 1, Variant(name, run, devices, missing, refuse))
            self._ready.clear()
            return run

        return register

    def sample(self, samples: Callable) -> Callable:
        """Registers `samples(device)`, which yields argument tuples for tests and benchmarks."""
        self.samples = samples
        return samples

    def pick(self, *args) -> Variant:
        """The variant that a call with these arguments runs. RuntimeError if a forced backend cannot serve it."""
        device = self._device(args)
        forced = forced_backend()
        if forced is not None:
            return self._pick_forced(forced, device, args)
        ready = self._ready.get(device)
        if ready is None:
            ready = self._ready[device] = [v for v in self.variants if self._usable(v, device)]
        for variant in ready:
            if variant.refuse is None or variant.refuse(*args) is None:
                return variant
        raise RuntimeError(f"{self.name}: no variant runs on {device}; move the tensors to cpu or cuda")

    def explain(self, *args) -> dict[str, str]:
        """For each variant, why it would refuse this call ("" when it would not)."""
        device = self._device(args)
        return {variant.name: variant.why_not(device, args) or "" for variant in self.variants}

    def preferred(self, device: str) -> str:
        """Name of the variant that serves ordinary calls on a device type ("cpu" or "cuda")."""
        forced = forced_backend()
        return forced or next(v.name for v in self.variants if self._usable(v, device))

    def _pick_forced(self, name: str, device: str, args: tuple) -> Variant:
        reasons = []
        for variant in self.variants:
            if variant.name == name:
                reason = variant.why_not(device, args)
                if reason is None:
                    return variant
                reasons.append(f"{name}: {reason}")
        detail = "; ".join(reasons) or f"it has {', '.join(v.name for v in self.variants)}"
        raise RuntimeError(f"{self.name}: backend {name!r} cannot run this call ({detail})")

    @staticmethod
    def _usable(variant: Variant, device: str) -> bool:
        return device in variant.devices and (variant.missing is None or variant.missing() is None)

    @staticmethod
    def _device(args: tuple) -> str:
        first = args[0]
        return (first if isinstance(first, torch.Tensor) else first[0]).device.type

    def _run_reference(self, *args):
        out = self.reference(*args)
        if not self.mutates:
            return out
        for index, value in zip(self._mutated, out, strict=True):
            args[index].copy_(value)
        return None

    def _register_node(self) -> Callable:
        def run(*args):
            if self.check is not None:
                self.check(*args)
            return self.pick(*args).run(*args)

        schema = torch.library.infer_schema(self._annotated(), mutates_args=self.mutates)
        node = torch.library.custom_op(f"fastdiff::{self.name}", run, mutates_args=self.mutates, schema=schema)
        node.register_fake((lambda *args: None) if self.mutates else self.reference)
        return node

    def _annotated(self) -> Callable:
        """The reference's signature, returning None when the op mutates: what the schema is inferred from."""
        if not self.mutates:
            return self.reference

        def stub(*args):
            raise AssertionError

        stub.__signature__ = self.signature.replace(return_annotation=None)
        stub.__annotations__ = {**self.reference.__annotations__, "return": None}
        return stub


def op(*, mutates: tuple[str, ...] = (), check: Callable[..., None] | None = None) -> Callable[[Callable], Op]:
    """Makes an op of its torch reference.

    A reference is pure: it never changes its arguments. Where `mutates` names arguments, it returns their new values in
    that order, and the op writes them in place and returns None. `check` raises on bad arguments before any work.
    """
    return lambda reference: Op(reference, mutates, check)
