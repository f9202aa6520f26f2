"""Steps whose branch weights (P1), coefficients (P3) or predicted data (P4) hooks have changed."""

from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.carry import Carry, Hook
from fastdiff.ops.solver_step import COEF, solver_step

_A, _B0, _D = (COEF.index(name) for name in ("a", "b0", "d"))
_PREDICTION = COEF.index("lo")  # the columns before it make the prediction from raw outputs


@dataclass(eq=False)
class AdjustedStep:
    """Runs the step kernel with coefficients of this step alone, one row per sample.

    coef    [R, 21] dtype of x: the plan's table
    edited  [R, 21] the same for a prediction that is given as data
    factor  [R] the conversion factor that branch weights multiply
    metas   [R, 6] per leaf
    aux     the known endpoint per leaf, or None
    source  [J, B] int32: the output row of each (branch, sample)
    """

    coef: torch.Tensor
    edited: torch.Tensor
    factor: torch.Tensor
    metas: list[torch.Tensor]
    aux: list[torch.Tensor | None]
    source: torch.Tensor

    def run(
        self, carry: Carry, outputs: list[torch.Tensor], weights: np.ndarray, hooks: dict[str, tuple[Hook, ...]]
    ) -> None:
        """One step of all leaves; P1 and P3 act on all of them, P4 on the first."""
        row = carry.rows[carry.tick]
        live = row.clamp(min=0).long()
        own = torch.where(row >= 0, torch.arange(row.numel(), device=row.device, dtype=torch.int32), -1)[
            None
        ].contiguous()
        coef = self.coef[live]
        J = self.source.shape[0]
        if hooks["branches"]:
            chosen = torch.from_numpy(np.ascontiguousarray(weights)).to(coef)
            coef[:, _B0 : _B0 + J] = self.factor[live][:, None] * chosen
        for hook in hooks["coefficients"]:
            coef = hook.coefficients(carry, coef)
        for k, leaf in enumerate(carry.leaves):
            given, source, table = [outputs[k]] * J, self.source, coef
            if k == 0 and hooks["after_prediction"]:
                x = carry.leaves[0].x
                denoised = predicted_data(x, self.aux[0], coef, self.edited[live], outputs[0], self.source)
                for hook in hooks["after_prediction"]:
                    denoised = hook.after_prediction(carry, denoised)
                table = torch.cat([self.edited[live][:, :_PREDICTION], coef[:, _PREDICTION:]], dim=1)
                given, source = [denoised], None
            tick = torch.zeros_like(leaf.tick)
            meta = self.metas[k][live].contiguous()
            state = (leaf.x, leaf.history, leaf.model_input, tick)
            solver_step(*state, given, source, self.aux[k], table.contiguous(), meta, own, carry.seed)
            leaf.tick += 1


def predicted_data(
    x: torch.Tensor,
    u: torch.Tensor | None,
    coef: torch.Tensor,
    edited: torch.Tensor,
    output: torch.Tensor,
    source: torch.Tensor,
) -> torch.Tensor:
    """The guided prediction as data: h = a x + sum b m + d u, then solved for the data in h = a' x + b' data + d' u.

    x, u          [B, ...] the state, and the known endpoint or None
    coef, edited  [B, 21] dtype of x: this step's coefficients a, b, d, and a', b', d' of the same step
    output        [M, ...] the network's; sample b of branch j has row source[j, b]
    """
    column = lambda table, index: table[:, index].view(-1, *[1] * (x.dim() - 1))
    h = (column(coef, _A) - column(edited, _A)) * x
    for j, rows in enumerate(source):
        weight = column(coef, _B0 + j)
        h = h + torch.where(weight != 0, weight * output[rows.long()].to(x.dtype), 0.0)
    if u is not None:
        h = h + (column(coef, _D) - column(edited, _D)) * u
    return h / column(edited, _B0)
