"""Programs: the kernel calls of a function, recorded once and repeated without Python in between."""

import threading
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from fastdiff.ops import native
from fastdiff.ops.memory import Arena, use_arena

# what looks at the values of a tensor, which a program would not look at again
_READS = set("item tolist numpy equal allclose isclose is_nonzero nonzero unique".split())
_READS |= {f"__{name}__" for name in "array bool complex contains float format index int repr str".split()}
_FRESH = {"empty", "empty_like", "empty_strided", "new_empty", "from_numpy"}


class NotCapturableError(RuntimeError):
    """A function called torch for something that a program would not repeat."""


class _OnlyKernels(TorchFunctionMode):
    """Refuses torch's own computations while a program is recorded: they would be missing from it.

    What only describes memory passes: sizes, strides, and views of the arguments.

    constants  the tensors outside of `arena` whose addresses kernels took, from address to tensor
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self.constants: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name == "data_ptr":
            address = func(*args)
            if not self._arena.holds(address):
                self.constants[address] = args[0]
            return address
        changes = name.endswith("_") and not name.endswith("__") or "out" in (kwargs or {})
        if changes or name in _READS or name == "__setitem__":
            raise NotCapturableError(f"program: torch ran {name}; only fastdiff.ops can be recorded")
        out = func(*args, **(kwargs or {}))
        if name not in _FRESH and not _memory(out) <= _memory((args, kwargs)):
            raise NotCapturableError(f"program: torch computed {name}; only fastdiff.ops can be recorded")
        return out


def _memory(values: object) -> set[int]:
    """Where the tensors among some values, and in sequences of them, lie."""
    if isinstance(values, torch.Tensor):
        return {values.untyped_storage().data_ptr()}
    if isinstance(values, dict):
        values = tuple(values.values())
    return set().union(*map(_memory, values)) if isinstance(values, (list, tuple)) else set()


class Program:
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
        self._lock = threading.Lock()
        self._inputs = tuple(example.detach().clone(memory_format=torch.contiguous_format) for example in examples)
        self._native = native.cpu().Program()
        self._arena = arena or Arena()
        with torch.no_grad(), use_arena(self._arena):
            self._native.start()
            recording = _OnlyKernels(self._arena)
            try:
                with recording:
                    self._outputs = function(*self._inputs)
            finally:
                self._native.stop()
        self._constants = recording.constants  # repetitions read them, whoever else has dropped them

    def __len__(self) -> int:
        """Number of recorded kernel calls."""
        return len(self._native)

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

    def run(self) -> None:
        """Repeats the kernels on the inputs that were loaded last."""
        self._native.run()

    def profile(self) -> list[tuple[str, float]]:
        """Runs on the inputs that were loaded last; the op and the microseconds of each kernel call, in order."""
        with self._lock:
            return self._native.profile()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The function's result for these inputs, in fresh memory."""
        with self._lock:
            self.load(*inputs)
            self.run()
            if isinstance(self._outputs, torch.Tensor):
                return self._outputs.clone()
            return tuple(out.clone() for out in self._outputs)
