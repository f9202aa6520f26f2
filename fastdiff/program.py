"""Programs: the kernel calls of a function, recorded once and repeated without Python in between."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from fastdiff.graph import StepGraph
from fastdiff.ops import native
from fastdiff.ops.memory import Arena, use_arena

# what looks at the values of a tensor, which a program would not look at again
_READS = set("item tolist numpy equal allclose isclose is_nonzero nonzero unique".split())
_READS |= {f"__{name}__" for name in "array bool complex contains float format index int repr str".split()}
_FRESH = {"empty", "empty_like", "empty_strided", "new_empty", "from_numpy"}


class NotCapturableError(RuntimeError):
    """A function called torch for something that a program would not repeat."""


class _Constants(TorchFunctionMode):
    """Notes the tensors that a function reads but neither makes nor is given: what is recorded needs them to stay.

    constants  from where they lie to the tensors
    """

    def __init__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self._own = _memory(inputs)
        self.constants: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        read = {t.untyped_storage().data_ptr(): t for t in _tensors((args, kwargs))}
        self.constants |= {at: t for at, t in read.items() if at not in self._own}
        out = func(*args, **(kwargs or {}))
        self._own |= _memory(out) - read.keys() - self.constants.keys()
        return out


class _OnlyKernels(_Constants):
    """Refuses torch's own computations while a program is recorded, too: they would be missing from it.

    What only describes memory passes: sizes, strides, and views of the arguments.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        changes = name.endswith("_") and not name.endswith("__") or "out" in (kwargs or {})
        if changes or name in _READS or name == "__setitem__":
            raise NotCapturableError(f"program: torch ran {name}; only fastdiff.ops can be recorded")
        out = super().__torch_function__(func, types, args, kwargs)
        if name not in _FRESH and not _memory(out) <= _memory((args, kwargs)):
            raise NotCapturableError(f"program: torch computed {name}; only fastdiff.ops can be recorded")
        return out


def _tensors(values: object) -> list[torch.Tensor]:
    """The tensors among some values, and in sequences and dictionaries of them."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = tuple(values.values())
    return [t for v in values for t in _tensors(v)] if isinstance(values, (list, tuple)) else []


def _memory(values: object) -> set[int]:
    """Where the tensors among some values lie."""
    return {t.untyped_storage().data_ptr() for t in _tensors(values)}


class _Recorded(ABC):
    """What was recorded for inputs of one shape: inputs and outputs in place, and calls that copy in and out."""

    _outputs: torch.Tensor | tuple[torch.Tensor, ...]

    def __init__(self, examples: tuple[torch.Tensor, ...]) -> None:
        self._lock = threading.Lock()
        self._inputs = tuple(example.detach().clone(memory_format=torch.contiguous_format) for example in examples)

    @abstractmethod
    def run(self) -> None:
        """Repeats the kernels on the inputs that were loaded last."""

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """The results of the last run, in place: the next run writes over them."""
        return (self._outputs,) if isinstance(self._outputs, torch.Tensor) else tuple(self._outputs)

    def load(self, *inputs: torch.Tensor) -> None:
        """Copies inputs in. Raises ValueError for other shapes than the examples'."""
        for kept, new in zip(self._inputs, inputs, strict=True):
            if kept.shape != new.shape:
                raise ValueError(f"program: inputs must have shape {tuple(kept.shape)}, got {tuple(new.shape)}")
            kept.copy_(new)

    def holds(self, *inputs: torch.Tensor) -> bool:
        """Whether the inputs that were loaded last equal these."""
        return all(torch.equal(kept, new) for kept, new in zip(self._inputs, inputs, strict=True))

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The function's result for these inputs, in fresh memory."""
        with self._lock:
            self.load(*inputs)
            self.run()
            if isinstance(self._outputs, torch.Tensor):
                return self._outputs.clone()
            return tuple(out.clone() for out in self._outputs)


class Program(_Recorded):
    """`function`, recorded for inputs of one shape: a call copies the inputs in, repeats the kernels, copies the outputs.

    function  from CPU tensors to a tensor or a tuple of tensors, through fastdiff.ops and views only
    examples  tensors like the inputs of every later call: same shapes and dtypes
    arena     the memory of intermediate results; programs that never run at the same time may share it

    Raises NotCapturableError where `function` computes with torch itself, RuntimeError without the compiled kernels.
    Calls may come from several threads; they take turns.
    """

    def __init__(self, function: Callable, examples: tuple[torch.Tensor, ...], arena: Arena | None = None) -> None:
        if native.cpu() is None:
            raise RuntimeError(f"program: {native.cpu_missing()}")
        super().__init__(examples)
        self._native = native.cpu().Program()
        self._arena = arena or Arena()
        with torch.no_grad(), use_arena(self._arena):
            self._native.start()
            recording = _OnlyKernels(self._inputs)
            try:
                with recording:
                    self._outputs = function(*self._inputs)
            finally:
                self._native.stop()
        self._constants = recording.constants  # repetitions read them, whoever else has dropped them

    def __len__(self) -> int:
        """Number of recorded kernel calls."""
        return len(self._native)

    def run(self) -> None:
        self._native.run()

    def profile(self) -> list[tuple[str, float]]:
        """Runs on the inputs that were loaded last; the op and the microseconds of each kernel call, in order."""
        with self._lock:
            return self._native.profile()


class GraphProgram(_Recorded):
    """The same on a GPU: one CUDA graph, in which torch may compute too. `arena` names the pool that graphs share.

    The function runs once before the capture, so that its kernels are compiled.
    """

    def __init__(self, function: Callable, examples: tuple[torch.Tensor, ...], arena: Arena | None = None) -> None:
        super().__init__(examples)
        self._arena = arena or Arena()  # its pool stays as long as the graph
        recording = _Constants(self._inputs)

        def body() -> None:
            with recording:
                self._outputs = function(*self._inputs)

        with torch.no_grad():
            function(*self._inputs)
            self._graph = StepGraph(body, self._inputs[0].device, self._arena.pool)
        self._constants = recording.constants

    def run(self) -> None:
        self._graph.replay()


def record(function: Callable, examples: tuple[torch.Tensor, ...], arena: Arena) -> Program | GraphProgram:
    """A program on the device of the examples."""
    return (GraphProgram if examples[0].is_cuda else Program)(function, examples, arena)
