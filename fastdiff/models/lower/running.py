"""A module whose forward runs on fused kernels."""

import threading
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from fastdiff.cache import FeatureCache
from fastdiff.models.lower import FAMILIES
from fastdiff.models.lower.adapters import adapter_state, is_adapted
from fastdiff.models.lower.coded_layers import StepRanges, follow_times
from fastdiff.models.lower.encoded import EncodedContexts
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, Lowered
from fastdiff.models.lower.observed import Observed, Observer
from fastdiff.models.lower.record import LayerRecord, Record, Settings, UnsupportedError
from fastdiff.ops import native
from fastdiff.ops.memory import Arena
from fastdiff.ops.registry import forced_backend
from fastdiff.program import GraphProgram, Program, record

Tensor = torch.Tensor
_PROGRAMS = 16  # shapes whose programs are kept


class Running:
    """Runs a lowered module: one recorded program per shape, on memory that all shapes share.

    Lowers the module at the first call, and again when its parameters have changed since. Copies and pickles carry the
    settings and the observed ranges only.
    """

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.module, self.settings = module, settings
        self.set_up_s = 0.0
        self.calls: Counter[str] = Counter()
        self.schedule: Callable[[], Tensor | None] = lambda: None  # times of the sampling that runs, if known
        self._lowered: Lowered | None = None
        self._ranges = StepRanges()
        self._observer: Observer | None = None
        self._observed: Observed | None = None
        self._reason, self._looks = "", []
        self._watched: list[tuple[dict, str, nn.Parameter, int, int | None]] = []
        self._adapted: tuple[list[nn.Module], list[tuple]] = [], []
        self._device = torch.device("cpu")
        self._lock = threading.RLock()
        self.features = None if settings.cache is None else FeatureCache(settings.cache)
        self._forget()

    def _forget(self) -> None:
        self._programs: dict[tuple, Program | GraphProgram] = {}
        self._contexts = EncodedContexts(lambda *context: self._lowered.encode(*context))
        self._arena = Arena()
        if self.features is not None:
            self.features.clear()

    def __getstate__(self) -> dict:
        if not self.keeps_original:
            raise RuntimeError("accelerate: a module whose original weights were given up cannot be copied or pickled")
        return {"module": self.module, "settings": self.settings, "observed": self._observed}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["module"], state["settings"])
        self._observed = state["observed"]

    @property
    def keeps_original(self) -> bool:
        return self.settings.keep_original

    @property
    def record(self) -> Record:
        """What runs as what, of the module as it is now."""
        try:
            return self.lowered.record
        except UnsupportedError as error:
            return Record([LayerRecord(type(self.module).__name__, "its own forward", str(error))])

    def install(self) -> None:
        """Adds what callers of the module may use besides its forward."""
        self.module.__dict__["prepare_schedule"] = self.prepare_schedule

    def remove(self) -> None:
        """Takes back what `install` added."""
        self.module.__dict__.pop("prepare_schedule", None)

    @property
    def lowered(self) -> Lowered:
        """The packed model, up to date with the module; raises UnsupportedError where it cannot be packed as it is now."""
        if self._reason and not self._changed() and _look(self.module) == self._looks:
            raise UnsupportedError(self._reason)
        if self._lowered is None or self.keeps_original and self._changed():
            self._lower()
        return self._lowered

    def _changed(self) -> bool:
        """Whether a parameter was written to in place, or is another one, or an adapter was switched."""
        for owner, name, p, address, version in self._watched:
            if owner[name] is not p or p.data_ptr() != address or (version is not None and p._version != version):
                return True
        layers, state = self._adapted
        return bool(layers) and adapter_state(layers) != state

    def _watch(self) -> None:
        """Remembers how the module is now."""
        layers = list(self.module.modules())
        self._watched = [
            (layer._parameters, name, p, p.data_ptr(), None if p.is_inference() else p._version)
            for layer in layers
            for name, p in layer._parameters.items()
            if p is not None
        ]
        adapted = [layer for layer in layers if is_adapted(layer)]
        self._adapted = adapted, adapter_state(adapted)
        self._looks = _look(self.module)

    def _lower(self) -> None:
        settings = self.settings
        self._forget()
        lower = FAMILIES[type(self.module).__name__]
        ranges = self._observer, self._observed
        packer = lambda keep, dry: Packer(settings.numbers, Record(), settings.spared, keep, dry, *ranges)
        self._lowered, self._reason = None, ""
        try:
            self._device = _device(self.module)
            with torch.no_grad():
                if not self.keeps_original:  # nothing may fail once the first weight is gone
                    lower(self.module, packer(True, True), settings.shares_time)
                chosen = packer(self.keeps_original or self._observer is not None, False)
                self._lowered = lower(self.module, chosen, settings.shares_time)
        except UnsupportedError as error:
            self._reason = str(error)
            raise
        finally:
            self._watch()
        self._ranges = chosen.ranges
        self._lowered.temporal.before = follow_times(self.module)
        self._lowered.temporal.schedule = lambda: self.schedule()
        if settings.deterministic == "batch":
            self._lowered.temporal.rows_at_once = 1

    def observe(self, calibration: Callable[[], object]) -> None:
        """Takes the ranges of what enters int8 convolutions from the calls of the module that `calibration` makes."""
        self._observer = Observer()
        try:
            self.lowered  # noqa: B018 - says whether the module can be lowered, before anything is sampled
            calibration()
            self._observed = self._observer.ranges()
        finally:
            self._observer = self._lowered = None
            self.calls.clear()

    def __call__(self, *args, **kwargs):
        """The module's forward, on fused kernels where they serve the call, else its own."""
        if torch.compiler.is_compiling():  # a compiler looks at torch's own operations
            return type(self.module).forward(self.module, *args, **kwargs)
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "accelerate: an accelerated network looks at its times and replays a CUDA graph of its own, which "
                "cannot be captured in another; sample with graph=False"
            )
        with self._lock:
            reason, call = self._read(args, kwargs)
            if call is None:
                if self.settings.strict:
                    raise RuntimeError(f"accelerate: strict, but this call is not served by the kernels: {reason}")
                self.calls[reason] += 1
                return type(self.module).forward(self.module, *args, **kwargs)
            self.calls["fused"] += 1
            with torch.no_grad():
                return call.wrap(self._run(call))

    def prepare_schedule(self, sample: Tensor, times: Tensor, **conditioning) -> None:
        """Fills the temporal table before a loop: times `[steps, B]` and the loop's conditioning, of B rows.

        Does nothing where the table belongs to the batches that ask (`exact_time`) or would not hold all rows.
        """
        with self._lock, torch.no_grad():
            if self.features is not None:
                self.features.clear()
            try:
                calls = [self.lowered.read(sample, t, **conditioning) for t in times]
            except UnsupportedError:
                return
            self.lowered.temporal.prepare(
                *(torch.cat(parts) for parts in zip(*(c.temporal for c in calls), strict=True))
            )

    def _read(self, args: tuple, kwargs: dict) -> tuple[str, Call | None]:
        try:
            call = self.lowered.read(*args, **kwargs)
        except UnsupportedError as error:
            if not self.keeps_original or _look(self.module) == self._looks:
                return str(error), None
            self._lowered = None  # it has other layers now: an adapter, perhaps
            return self._read(args, kwargs)
        tensors = (call.sample, *call.context, *call.temporal[1:])
        for t in tensors:
            if type(t) not in (Tensor, nn.Parameter):  # results of collectives, for one, have no memory yet
                return f"inputs of class {type(t).__name__}", None
        elsewhere = {str(t.device) for t in tensors if t.device != self._device}
        if elsewhere:
            return f"inputs on {' and '.join(sorted(elsewhere))}, weights on {self._device}", None
        if torch.is_grad_enabled() and (self.module.training or any(t.requires_grad for t in tensors)):
            return "a gradient is wanted", None
        if call.sample.shape[0] == 0:
            return "empty batch", None
        return "", call

    def _run(self, call: Call) -> Tensor:
        lowered = self._lowered
        time, *fixed = call.temporal
        time = time.to(self._device)
        rows = lowered.temporal.lookup(time, *fixed)
        self._ranges.fill(time)
        lowered.prepare(call)
        if self._observer is not None:
            self._observer.follow(time)
        if self._device.type == "cpu" and native.cpu() is None or forced_backend() or self._observer is not None:
            return lowered.body(call.sample, rows, *lowered.encode(*call.context))
        key = (call.sample.shape, call.sample.dtype, *((c.shape, c.dtype) for c in call.context))
        if len(self._programs) >= _PROGRAMS:
            self._forget()
        key, encoded = self._contexts.encoded(key, call.context)
        if self.features is not None:
            return self._run_staged(key, call, rows, encoded)
        body = lambda sample, rows: lowered.body(sample, rows, *encoded)
        return self._program(key, body, (call.sample, rows))(call.sample, rows)

    def _program(self, key: tuple, function: Callable, inputs: tuple[Tensor, ...]) -> Program | GraphProgram:
        if key not in self._programs:
            self._programs[key] = record(function, inputs, self._arena)
        return self._programs[key]

    def _run_staged(self, key: tuple, call: Call, rows: Tensor, encoded: tuple[Tensor, ...]) -> Tensor:
        """Head and tail run as ever, the middle for the samples whose features the cache does not serve."""
        lowered, given = self._lowered, (call.sample, rows)
        begin = lambda sample, rows: lowered.head(sample, rows, *encoded)
        head = self._program((*key, "head"), begin, given)(*given)

        def middle(index: Tensor | None) -> Tensor:
            parts = [lambda t: t] if index is None else [lambda t, i=i: t.index_select(0, i) for i in _powers(index)]
            return torch.cat([self._run_middle(key, call, head, rows, encoded, take) for take in parts])

        time, *fixed = call.temporal
        x = self.features.serve(head[0], time, (*fixed, *call.context), middle, lowered.adds)
        end = lambda x, sample, rows, *head: lowered.tail(x, head, sample, rows, *encoded)
        inputs = (x, *given, *head)
        return self._program((*key, "tail"), end, inputs)(*inputs)

    def _run_middle(self, key: tuple, call: Call, head: tuple, rows: Tensor, encoded: tuple, take: Callable) -> Tensor:
        """The middle for the samples that `take` takes."""
        self._ranges.fill(take(call.temporal[0]))
        n = len(head)
        run = lambda rows, *rest: self._lowered.middle(rest[:n], rows, *rest[n:])
        inputs = tuple(map(take, (rows, *head, *encoded)))
        return self._program((*key, "middle", len(inputs[0])), run, inputs)(*inputs)


def _device(module: nn.Module) -> torch.device:
    """Where all weights of a module are."""
    devices = {t.device for t in (*module.parameters(), *module.buffers())}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise UnsupportedError(f"weights on {' and '.join(sorted(map(str, devices))) or 'no device'}")
    return devices.pop()


def _look(module: nn.Module) -> list[tuple]:
    """What a module is made of, and what stands between its layers."""
    hooks = lambda m: len(m._forward_hooks) + len(m._forward_pre_hooks)
    return [(id(m), hooks(m), "forward" in vars(m), id(vars(m).get("processor"))) for m in module.modules()]


def _powers(index: Tensor) -> list[Tensor]:
    """An index in parts whose lengths are powers of two, so that few programs serve all numbers of samples."""
    n = len(index)
    return list(index.split([1 << bit for bit in reversed(range(n.bit_length())) if n >> bit & 1]))
