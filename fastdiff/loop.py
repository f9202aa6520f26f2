"""One run of the sampling loop: model calls, hook points, the step kernel."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._pytree import tree_unflatten

from fastdiff.adjusted import AdjustedStep
from fastdiff.calls import ModelCalls
from fastdiff.carry import POINTS, Carry, Hook, overriding
from fastdiff.conditioning import Conditioning
from fastdiff.graph import StepGraph
from fastdiff.initial import Start, endpoints, initial_leaves, stream_offset
from fastdiff.ops.solver_step import bind
from fastdiff.options import RunOptions
from fastdiff.plan import Plan


class NonFiniteError(FloatingPointError):
    """NaN or Inf appeared while sampling."""


def non_finite(tick: int, plan: Plan) -> NonFiniteError:
    """The error of a run whose state stopped being finite at a call."""
    return NonFiniteError(
        f"sampling: NaN or Inf after call {tick + 1} of {plan.ticks} "
        f"(model time {plan.time[tick].tolist()[:8]}); run the model in float32 or bfloat16, or lower guidance"
    )


@dataclass(eq=False)
class Run:
    """A loop that has begun. `advance` makes one model call and one step of every unfinished sample."""

    calls: ModelCalls
    carry: Carry
    options: RunOptions
    steps: list[Callable]
    adjusted: AdjustedStep
    time: torch.Tensor
    flags: torch.Tensor
    points: dict[str, tuple[Hook, ...]]
    graph: StepGraph | None = None

    @classmethod
    def begin(cls, net: Callable, plan: Plan, start: Start, conditioning: Conditioning, options: RunOptions) -> "Run":
        """Allocates everything that the loop needs and makes the initial state."""
        device, dtype = start.seed.device, options.dtype
        to = lambda array, dtype: torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)
        coef, meta, rows = to(plan.coef, dtype), to(plan.meta, torch.int32), to(plan.rows, torch.int32)
        metas = [meta + stream_offset(k, device) for k in range(len(start.shapes))]
        aux = endpoints(options.aux, start.shapes, dtype, device, plan)
        leaves = initial_leaves(start, aux, plan, dtype, options.resolve_model_dtype(net))
        source = torch.zeros(plan.branches, plan.batch, dtype=torch.int32, device=device)
        points = {point: overriding(options.hooks, point) for point in POINTS}
        if points["after_prediction"] and any(table.solver.history == "raw" for table in plan.tables):
            raise ValueError("hooks: a table compiled from a scheduler object does not know the predicted data (P4)")
        calls = ModelCalls(net, conditioning, start.structure, options.micro_batch, source)
        time = to(plan.time, torch.float32)
        calls.prepare(time, leaves)
        return cls(
            calls=calls,
            carry=Carry(leaves, plan, start.seed, rows),
            options=options,
            steps=[
                bind(leaf.x, leaf.history, leaf.model_input, leaf.tick, source, u, coef, m, rows, start.seed)
                for leaf, u, m in zip(leaves, aux, metas, strict=True)
            ],
            adjusted=AdjustedStep(coef, to(plan.edited, dtype), to(plan.factor, dtype), metas, aux, source),
            time=time,
            flags=torch.zeros(plan.ticks, dtype=torch.float32, device=device),
            points=points,
        )

    def state(self, copy: bool = False) -> object:
        """The state as the tensor or pytree that the user knows."""
        leaves = [leaf.x.clone() if copy else leaf.x for leaf in self.carry.leaves]
        return tree_unflatten(leaves, self.calls.structure)

    def advance(self) -> None:
        """Makes the next model call and step: eagerly, or by replaying the captured step."""
        tick = self.carry.tick
        if not self._graphable(tick):
            return self._advance_eager()
        if self.graph is None:
            self.calls.select(self.carry.plan.weights[tick])
            self.graph = StepGraph(self._captured_step, self.carry.rows.device)
        self.graph.replay()
        self.carry.tick += 1

    def _graphable(self, tick: int) -> bool:
        """The first call runs eagerly (it warms kernels up); later ones if every branch of every sample is evaluated."""
        return (
            self.options.graph and tick > 0 and bool(self.carry.plan.weights[tick].all()) and self.carry.rows.is_cuda
        )

    def _captured_step(self) -> None:
        """One step in which the tick is only read on the device."""
        leaves = self.carry.leaves
        tick = leaves[0].tick.long()
        outputs = self.calls.evaluate(leaves, self.time.index_select(0, tick)[0])
        for output, step in zip(outputs, self.steps, strict=True):
            step([output] * self.carry.plan.branches)
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
        self.calls.select(weights)
        outputs = self.calls.evaluate(carry.leaves, self.time[tick] if carry.time is None else carry.time)
        if points["statistics"]:
            branch_outputs = [outputs[0][source.long()] for source in self.calls.source]
            for hook in points["statistics"]:
                hook.statistics(carry, branch_outputs)
        if points["branches"] or points["coefficients"] or points["after_prediction"]:
            self.adjusted.run(carry, outputs, weights, points)
        else:
            for output, step in zip(outputs, self.steps, strict=True):
                step([output] * carry.plan.branches)
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
            raise non_finite(int(bad[0]), self.carry.plan)

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
