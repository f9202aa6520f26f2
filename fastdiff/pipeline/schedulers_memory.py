"""The memory of a run on one kind of sample: history, rows, and kernel calls bound to addresses."""

import numpy as np
import torch

from fastdiff.ops import native
from fastdiff.ops.registry import forced_backend
from fastdiff.ops.solver_step import COEF, META, solver_step
from fastdiff.ops.strides import evenly_strided, sizes
from fastdiff.pipeline.schedulers_plan import Plan, references
from fastdiff.pipeline.schedulers_probe import Ref, fill
from fastdiff.solvers.row import STEP_STREAM

_BOUND = 64  # calls kept; an allocator returns the same few addresses step after step


class Memory:
    """What steps of samples of one shape, dtype and device share.

    shape, dtype, device  of the state; dtype is float32 or float64
    history               [S, *shape] slots; grows on demand
    """

    @torch.inference_mode(False)
    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.history = torch.zeros(0, *shape, dtype=dtype, device=device)
        self.views: list[torch.Tensor] = []
        self.filled = 0
        self.tick = torch.zeros(1, dtype=torch.int32, device=device)
        self.seeds: list[int] = []
        self.seed = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self.native = device.type == "cpu" and native.cpu() is not None
        if self.native:
            self._tick, self._make = self.tick.numpy(), native.cpu().SolverStep
            self._code, self._sizes = native.TYPE_CODES[dtype], sizes(torch.empty(shape, device="meta"))
            self._expected = [], []
        self._bound: dict[tuple, object] = {}
        self._posts: dict[Plan, dict[str, object]] = {}
        self._numbers: dict[Plan, tuple[int, ...]] = {}
        self._reserve(32)

    @torch.inference_mode(False)  # tensors made inside could not be written outside
    def _reserve(self, capacity: int) -> None:
        """Room for this many rows; the line of `rows` with the same number leads to each."""
        coef = torch.zeros(capacity, len(COEF), dtype=self.dtype, device=self.device)
        meta = torch.full((capacity, len(META)), -1, dtype=torch.int32, device=self.device)
        if self.filled:
            coef[: self.filled], meta[: self.filled] = self.coef, self.meta
        lines = torch.arange(capacity, dtype=torch.int32, device=self.device)
        self.coef, self.meta = coef, meta
        self.rows = lines[:, None].expand(capacity, self.shape[0]).contiguous()
        self._fixed = [t.data_ptr() for t in (self.tick, coef, meta, self.rows, self.seed)]
        self._strides = [*coef.stride(), 0, 0]
        self._bound.clear()

    def numbers(self, plan: Plan) -> tuple[int, ...]:
        """The numbers of a plan's rows, that of the next state first; the history has the slots for it."""
        found = self._numbers.get(plan)
        if found is None:
            self.need(plan.slots)
            depth = plan.node.depth - 1
            tail = (-1, depth, STEP_STREAM, 0, 0)
            further = [self._add(coef, (-1, *tail)) for coef in plan.further]
            found = self._numbers[plan] = (self._add(plan.coef, (plan.slot_h, *tail)), *further)
        return found

    def _add(self, coef: np.ndarray, meta: tuple[int, ...]) -> int:
        if self.filled == len(self.coef):
            self._reserve(2 * self.filled)
        self.coef[self.filled] = torch.from_numpy(coef)
        self.meta[self.filled] = torch.tensor(meta, dtype=torch.int32)
        self.filled += 1
        return self.filled - 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def need(self, slots: int) -> None:
        """At least this many history slots; what they hold stays."""
        if slots > len(self.history):
            more = torch.zeros(slots, *self.shape, dtype=self.dtype, device=self.device)
            more[: len(self.history)] = self.history
            self.history, self.views = more, list(more)
            self._bound.clear()
            self._posts.clear()

    @torch.no_grad()
    def put(self, tensors: list[torch.Tensor]) -> None:
        """Begins a history with these tensors, which may be slots of the one before; that one stays as it is."""
        if tensors:
            kept, self.history = len(self.history), self.history[:0]
            self.need(max(kept, len(tensors)))
            for slot, tensor in zip(self.views, tensors, strict=False):
                slot.copy_(tensor.detach())

    def attributes(self, plan: Plan) -> dict[str, object]:
        """What a scheduler's attributes are after this step: tensors are views of the history."""
        found = self._posts.get(plan)
        if found is None:
            seen = {name: value for name, value in plan.tensors.items() if name not in plan.hidden}
            found = {**plan.plain, **{name: fill(value, self.tensor) for name, value in seen.items()}}
            if all(ref.scale == 1.0 for value in seen.values() for ref in references(value)):
                self._posts[plan] = found
        return found

    def tensor(self, ref: Ref) -> torch.Tensor:
        """The tensor that a reference to a slot stands for."""
        view = self.views[ref.slot]
        return view if ref.scale == 1.0 else view * ref.scale

    def is_direct(self) -> bool:
        """Whether `run` calls the compiled CPU kernel, and not the op."""
        return self.native and forced_backend() is None

    def run(
        self,
        row: int,
        x: torch.Tensor,
        history: torch.Tensor,
        copy: torch.Tensor | None,
        sample: torch.Tensor,
        outputs: list[torch.Tensor],
    ) -> None:
        """One row for all samples: x becomes the next state, `copy` (of any float type) receives it too."""
        if not self.is_direct():
            self.tick.fill_(row)
            copies = x.new_empty(0, *self.shape) if copy is None else copy[None]
            fixed = (None, sample, self.coef, self.meta, self.rows, self.seed)
            return solver_step(x, history, copies, self.tick, outputs, *fixed)
        self._tick[0] = row
        kind = -1 if copy is None else native.TYPE_CODES[copy.dtype]
        address = 0 if copy is None else copy.data_ptr()
        key = (x.data_ptr(), sample.data_ptr(), history.data_ptr(), len(history), address, kind)
        step = self._bound.get(key)
        if step is None:
            step = self._bind(key)
            step.expect(*self._expected)
        if not step.run(outputs):
            pairs = [evenly_strided(m) for m in outputs]
            outputs = [m for m, _ in pairs]
            self._expected = outputs, [(native.TYPE_CODES[m.dtype], m.shape[0], own) for m, own in pairs]
            step.expect(*self._expected)
            step.run(outputs)

    def _bind(self, key: tuple) -> object:
        """The compiled call for these addresses. It holds no tensor: memory that is free may come back with the same address."""
        x, sample, history, slots, copy, kind = key
        if len(self._bound) >= _BOUND:
            self._bound.clear()
        code, addresses = self._code, [x, history, copy or x, self._fixed[0], sample, *self._fixed[1:]]
        size = [*self._sizes, slots, int(kind >= 0), len(self.rows), len(self.coef)]
        step = self._make(0, addresses, [code, code if kind < 0 else kind], size, self._strides)
        self._bound[key] = step
        return step
