"""One run of the sampling loop: model calls, hook points, the step kernel."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdiff.carry import Carry, Hook, Leaf, overriding
from fastdiff.conditioning import Conditioning
from fastdiff.graph import StepGraph
from fastdiff.initial import endpoints, initial_leaf, stream_offset
from fastdiff.ops.solver_step import COEF, bind, solver_step
from fastdiff.plan import Plan

_C_IN = COEF.index("c_in")


class NonFiniteError(FloatingPointError):
    """NaN or Inf appeared while sampling."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is executed; see `Sampler.step`."""

    aux: object = None
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    hooks: tuple[Hook, ...] = ()
    guard: bool = True
    graph: bool = False
    micro_batch: int | None = None
    model_dtype: torch.dtype | None = None

    def __post_init__(self):
        object.__setattr__(self, "hooks", tuple(self.hooks))
        if self.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: the state is float32 or float64, got {self.dtype}; the model may have any")
        if self.graph and self.hooks:
            raise ValueError("graph: hooks run between the parts of a step; sample without graph or without hooks")
        if not all(isinstance(hook, Hook) for hook in self.hooks):
            raise TypeError("hooks: must be fastdiff.Hook objects")

    def resolve_device(self, net: Callable, x: object) -> torch.device:
        """The device of the run: the given one, else that of x, else that of the network."""
        if self.device is not None:
            device = torch.device(self.device)
            if device.type == "cuda" and not torch.cuda.is_available():
                raise RuntimeError("device: cuda was asked for, but torch sees no CUDA GPU; use device='cpu'")
            return device
        leaves = tree_flatten(x)[0] if x is not None else list(_parameters(net))
        return leaves[0].device if leaves and isinstance(leaves[0], torch.Tensor) else torch.device("cpu")

    def resolve_model_dtype(self, net: Callable) -> torch.dtype:
        """The dtype of the network's input."""
        if self.model_dtype is not None:
            return self.model_dtype
        return next((p.dtype for p in _parameters(net) if p.dtype.is_floating_point), self.dtype)


def _parameters(net: Callable):
    return net.parameters() if isinstance(net, torch.nn.Module) else iter(())


@dataclass(eq=False)
class Run:
    """A loop that has begun. `advance` makes one model call and one step of every unfinished sample."""

    net: Callable
    carry: Carry
    structure: object
    conditioning: Conditioning
    options: RunOptions
    coef: torch.Tensor
    edited: torch.Tensor
    metas: list[torch.Tensor]
    aux: list[torch.Tensor | None]
    source: torch.Tensor
    steps: list[Callable]
    time: torch.Tensor
    flags: torch.Tensor
    points: dict[str, tuple[Hook, ...]]
    graph: StepGraph | None = None
    _pairs: np.ndarray | None = None
    _index: torch.Tensor | None = None
    _cond: dict = field(default_factory=dict)

    @classmethod
    def begin(
        cls, net, plan: Plan, shapes, structure, given, seeds, conditioning, options: RunOptions, device
    ) -> "Run":
        """Allocates everything that the loop needs and makes the initial state."""
        to = lambda array, dtype: torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)
        coef, meta, rows = to(plan.coef, options.dtype), to(plan.meta, torch.int32), to(plan.rows, torch.int32)
        metas = [meta + stream_offset(k, device) for k in range(len(shapes))]
        aux = endpoints(options.aux, shapes, options.dtype, device, plan)
        model_dtype = options.resolve_model_dtype(net)
        leaves = [
            initial_leaf(
                k, shape, given[k] if given else None, aux[k], plan, seeds, options.dtype, model_dtype, device
            )
            for k, shape in enumerate(shapes)
        ]
        source = torch.zeros(plan.branches, plan.batch, dtype=torch.int32, device=device)
        steps = [
            bind(leaf.x, leaf.history, leaf.model_input, leaf.tick, source, u, coef, m, rows, seeds)
            for leaf, u, m in zip(leaves, aux, metas, strict=True)
        ]
        names = ("before_step", "branches", "statistics", "coefficients", "after_prediction", "after_step", "group")
        return cls(
            *(
                net,
                Carry(leaves, plan, seeds, rows),
                structure,
                conditioning,
                options,
                coef,
                to(plan.edited, options.dtype),
            ),
            *(metas, aux, source, steps, to(plan.time, torch.float32)),
            flags=torch.zeros(plan.ticks, dtype=torch.float32, device=device),
            points={name: overriding(options.hooks, name) for name in names},
        )

    def advance(self) -> None:
        """Makes the next model call and step: eagerly, or by replaying the captured step."""
        tick = self.carry.tick
        if not self._graphable(tick):
            return self._advance_eager()
        if self.graph is None:
            self._select(self.carry.plan.weights[tick])
            self.graph = StepGraph(self._captured_step, self.source.device)
        self.graph.replay()
        self.carry.tick += 1

    def _graphable(self, tick: int) -> bool:
        """The first call runs eagerly (it warms kernels up); later ones if every branch of every sample is evaluated."""
        return self.options.graph and tick > 0 and bool(self.carry.plan.weights[tick].all()) and self.source.is_cuda

    def _captured_step(self) -> None:
        """One step in which the tick is only read on the device."""
        leaves, plan = self.carry.leaves, self.carry.plan
        tick = leaves[0].tick.long()
        inputs = [leaf.model_input.flatten(0, 1) for leaf in leaves]
        time = self.time.index_select(0, tick)[0].repeat(plan.branches)
        outputs = self._call(inputs, time, slice(None))
        for k, step in enumerate(self.steps):
            step([outputs[k]] * plan.branches)
        if self.options.guard:
            self.flags.index_copy_(0, tick, sum(leaf.x.sum() for leaf in leaves).to(self.flags.dtype)[None])

    def _advance_eager(self) -> None:
        """One model call (P0 to P3), the edit of the prediction (P4), the step, P5 and P6."""
        carry, points, tick = self.carry, self.points, self.carry.tick
        carry.time = None
        for hook in points["before_step"]:
            hook.before_step(carry)
        if points["before_step"]:
            self._refresh_input(tick)
        weights = carry.plan.weights[tick]
        for hook in points["branches"]:
            weights = hook.branches(carry, weights)
        outputs = self._evaluate(tick, weights)
        if points["statistics"]:
            branch_outputs = [outputs[0][self.source[j].long()] for j in range(carry.plan.branches)]
            for hook in points["statistics"]:
                hook.statistics(carry, branch_outputs)
        self._step(outputs, tick)
        carry.tick += 1
        for hook in points["after_step"]:
            hook.after_step(carry)
        for hook in points["group"]:
            hook.group(carry)
        if (points["after_step"] or points["group"]) and carry.tick < carry.plan.ticks:
            self._refresh_input(carry.tick)
        if self.options.guard:
            # one reduction and no synchronisation: the sum of a tensor with a NaN or Inf is not finite
            self.flags[tick] = sum(leaf.x.sum() for leaf in carry.leaves)

    def check_finite(self) -> None:
        """Raises NonFiniteError naming the first bad step, if the guard is on."""
        bad = (~torch.isfinite(self.flags)).nonzero() if self.options.guard else ()
        if len(bad):
            tick = int(bad[0])
            raise NonFiniteError(
                f"sampling: NaN or Inf after call {tick + 1} of {self.carry.plan.ticks} "
                f"(model time {self.carry.plan.time[tick].tolist()[:8]}); run the model in float32 or bfloat16, or lower guidance"
            )

    def _evaluate(self, tick: int, weights: np.ndarray) -> list[torch.Tensor]:
        """Calls the network on the (branch, sample) pairs that are needed; returns one tensor of M rows per leaf."""
        self._select(weights)
        carry, B = self.carry, self.carry.plan.batch
        if self._index is None:
            inputs = [leaf.model_input.flatten(0, 1) for leaf in carry.leaves]
            time = self.time[tick] if carry.time is None else carry.time
            time = time.repeat(carry.plan.branches, *[1] * (time.dim() - 1)) if carry.plan.branches > 1 else time
        else:
            sample = self._index % B
            inputs = [leaf.model_input[0].index_select(0, sample) for leaf in carry.leaves]
            time = (self.time[tick] if carry.time is None else carry.time).index_select(0, sample)
        rows = inputs[0].shape[0]
        if rows == 0:
            return inputs
        size = self.options.micro_batch or rows
        parts = [self._call(inputs, time, slice(m, m + size)) for m in range(0, rows, size)]
        return parts[0] if len(parts) == 1 else [torch.cat(leaf) for leaf in zip(*parts, strict=True)]

    def _call(self, inputs: list[torch.Tensor], time: torch.Tensor, rows: slice) -> list[torch.Tensor]:
        x = tree_unflatten([tensor[rows] for tensor in inputs], self.structure)
        out = self.net(x, time[rows], **self.conditioning.rows(self._cond, rows))
        outputs = tree_flatten(out)[0]
        wanted = [tensor[rows].shape for tensor in inputs]
        if [tuple(o.shape) for o in outputs] != [tuple(w) for w in wanted]:
            got = [list(getattr(o, "shape", ())) for o in outputs]
            raise ValueError(f"net: outputs like its input expected, {[list(w) for w in wanted]}, got {got}")
        return outputs

    def _select(self, weights: np.ndarray) -> None:
        """Finds the pairs to evaluate and gathers their conditioning, when they differ from the last call's."""
        needed = weights != 0.0
        if self._pairs is not None and np.array_equal(needed, self._pairs):
            return
        self._pairs = needed.copy()
        flat = np.flatnonzero(needed.T)  # branch-major: all conditional rows first
        position = np.zeros(needed.T.size, dtype=np.int32)
        position[flat] = np.arange(flat.size)
        device = self.source.device
        self.source.copy_(torch.from_numpy(position.reshape(self.source.shape)))
        self._index = None if flat.size == position.size else torch.from_numpy(flat).to(device)
        self._cond = self.conditioning.select(self._index)

    def _step(self, outputs: list[torch.Tensor], tick: int) -> None:
        points, J = self.points, self.carry.plan.branches
        special = bool(points["coefficients"] or points["after_prediction"])
        for k, (leaf, step) in enumerate(zip(self.carry.leaves, self.steps, strict=True)):
            if special and k == 0:
                self._special_step(leaf, outputs[0], tick)
            else:
                step([outputs[k]] * J)

    def _special_step(self, leaf: Leaf, output: torch.Tensor, tick: int) -> None:
        """The first leaf's step where hooks change coefficients (P3) or the predicted data (P4)."""
        carry, B = self.carry, self.carry.plan.batch
        row = carry.rows[tick]
        live = row.clamp(min=0).long()
        coef, meta = self.coef[live], self.metas[0][live].contiguous()
        for hook in self.points["coefficients"]:
            coef = hook.coefficients(carry, coef)
        outputs, source = [output] * carry.plan.branches, self.source
        if self.points["after_prediction"]:
            denoised = self._denoised(coef, outputs, tick)
            for hook in self.points["after_prediction"]:
                denoised = hook.after_prediction(carry, denoised)
            # the prediction is now given as data, whatever the branches were
            edited = self.edited[live]
            coef = torch.cat([edited[:, :6], coef[:, 6:]], dim=1)
            outputs, source = [denoised], None
        own = torch.where(row >= 0, torch.arange(B, device=row.device, dtype=torch.int32), -1)[None]
        start = torch.zeros_like(leaf.tick)
        arguments = (leaf.x, leaf.history, leaf.model_input, start, outputs, source, self.aux[0], coef.contiguous())
        solver_step(*arguments, meta, own.contiguous(), carry.seed)
        leaf.tick += 1

    def _denoised(self, coef: torch.Tensor, outputs: list[torch.Tensor], tick: int) -> torch.Tensor:
        """The guided prediction as data, [B, ...]: h = a x + sum b m + d u, converted."""
        leaf, aux = self.carry.leaves[0], self.aux[0]
        shape = (-1, *[1] * (leaf.x.dim() - 1))
        live = self.carry.rows[tick].clamp(min=0).long()
        h = coef[:, 0].view(shape) * leaf.x
        for j, m in enumerate(outputs):
            weight = coef[:, 1 + j].view(shape)
            h = h + torch.where(weight != 0, weight * m[self.source[j].long()].to(leaf.x.dtype), 0.0)
        edited = self.edited[live]
        a, b, d = (edited[:, c].view(shape) for c in (0, 1, 5))
        if aux is not None:
            h = h + coef[:, 5].view(shape) * aux - d * aux
        return (h - a * leaf.x) / b  # h = a x + b data + d u, inverted

    def _refresh_input(self, tick: int) -> None:
        """Recomputes the model's input after a hook changed the state."""
        plan = self.carry.plan
        scale = np.array([t.c_in[min(tick, len(t) - 1)] for t in plan.tables])
        for leaf in self.carry.leaves:
            factor = torch.from_numpy(scale).to(leaf.x).view(-1, *[1] * (leaf.x.dim() - 1))
            leaf.model_input.copy_((leaf.x * factor).to(leaf.model_input.dtype).expand_as(leaf.model_input))


def progress_bar(total: int, show: bool):
    """A tqdm bar, or something that does nothing."""
    if not show:
        return _NoBar()
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="sampling", unit="call", leave=False)


class _NoBar(contextlib.nullcontext):
    def __enter__(self):
        return self

    def update(self, n: int) -> None:
        pass
