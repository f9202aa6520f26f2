"""What travels through the sampling loop, and the points where others may act on it."""

from dataclasses import dataclass, field

import numpy as np
import torch

from fastdiff.plan import Plan


@dataclass(eq=False)
class Leaf:
    """One tensor of the state with all that belongs to it.

    x            [B, ...] float32 or float64: the state
    history      [S, B, ...] dtype of x
    model_input  [J, B, ...] dtype of the model: c_in * x, once per branch
    tick         [1] int32 on the device
    """

    x: torch.Tensor
    history: torch.Tensor
    model_input: torch.Tensor
    tick: torch.Tensor

    def gather(self, index: torch.Tensor) -> None:
        """Replaces sample b by sample index[b], in place."""
        self.x.copy_(self.x[index])
        self.history.copy_(self.history[:, index])
        self.model_input.copy_(self.model_input[:, index])


@dataclass(eq=False)
class Carry:
    """The whole state of a running loop.

    leaves   one entry per tensor of the state
    plan     the compiled plan
    tick     which call comes next
    seed     [B] int64 noise keys
    rows     [T, B] int32 on the device
    time     None, or [B] or [B, N] model times that a hook wants to use for the next call
    extras   per-sample tensors [B, ...] of hooks; gathered with the samples
    """

    leaves: list[Leaf]
    plan: Plan
    seed: torch.Tensor
    rows: torch.Tensor
    tick: int = 0
    time: torch.Tensor | None = None
    extras: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def x(self) -> torch.Tensor:
        """The state, where it is a single tensor."""
        return self.leaves[0].x

    def gather(self, index: torch.Tensor) -> None:
        """Replaces sample b by sample index[b]: state, history and extras; noise keys stay, so that copies diverge.

        index  [B] int64. Samples that change places must run the same rows of the plan.
        """
        rows = self.plan.rows[self.tick :]
        if not np.array_equal(rows, rows[:, index.cpu().numpy()]):
            raise ValueError("gather: samples that are exchanged must have equal solvers and steps")
        for leaf in self.leaves:
            leaf.gather(index)
        self.extras = {name: value[index] for name, value in self.extras.items()}


class Hook:
    """Acts on the loop at its seven points; override what you need. Only overridden points cost anything."""

    def before_step(self, carry: Carry) -> None:
        """P0: may move the state or set `carry.time` before the model is called."""

    def branches(self, carry: Carry, weights: np.ndarray) -> np.ndarray:
        """P1: may change the branch weights [B, J] of this call; 0 means that the branch is not evaluated."""
        return weights

    def statistics(self, carry: Carry, outputs: list[torch.Tensor]) -> None:
        """P2: sees the raw outputs, one [B, ...] tensor per branch (first leaf); for Gram matrices and accumulators."""

    def coefficients(self, carry: Carry, coef: torch.Tensor) -> torch.Tensor:
        """P3: may change this step's coefficients [B, 21] (columns `ops.solver_step.COEF`)."""
        return coef

    def after_prediction(self, carry: Carry, denoised: torch.Tensor) -> torch.Tensor:
        """P4: may edit the predicted data [B, ...] (first leaf) before the solver uses it."""
        return denoised

    def after_step(self, carry: Carry) -> None:
        """P5: may change the new state in place."""

    def group(self, carry: Carry) -> None:
        """P6: may exchange samples with `carry.gather`."""


POINTS = ("before_step", "branches", "statistics", "coefficients", "after_prediction", "after_step", "group")


def overriding(hooks: tuple[Hook, ...], point: str) -> tuple[Hook, ...]:
    """The hooks that act at a point."""
    return tuple(hook for hook in hooks if getattr(type(hook), point) is not getattr(Hook, point))
