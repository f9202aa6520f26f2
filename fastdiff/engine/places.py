"""Places: memory for samples that come and go, with the step kernel bound to it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.adjusted import predicted_data
from fastdiff.carry import Leaf
from fastdiff.engine.request import Request
from fastdiff.initial import stream_offset
from fastdiff.ops.solver_step import COEF, META, bind

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Line:
    """The next call of some requests: one line of a plan for R places and J branches. A place is its own table row.

    coef, meta  [R, 21] float64, [R, 6] int32
    edited      [R, 21] float64: the same for a prediction that is given as data
    rows        [1, R] int32: the place itself, -1 where nothing is to be done
    tick        [R] int32: which call of the sample's own plan this is
    time        [R] float64 model times
    weights     [R, J] float64 branch weights
    """

    coef: np.ndarray
    meta: np.ndarray
    edited: np.ndarray
    rows: np.ndarray
    tick: np.ndarray
    time: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, requests: list[Request], places: int, branches: int) -> "Line":
        coef, meta = np.zeros((places, len(COEF))), np.zeros((places, len(META)), dtype=np.int32)
        edited = coef.copy()
        rows, tick = np.full((1, places), -1, dtype=np.int32), np.zeros(places, dtype=np.int32)
        time, weights = np.zeros(places), np.zeros((places, branches))
        for request in requests:
            plan, now = request.plan, request.tick
            for b, place in enumerate(request.places):
                if place >= 0:
                    r = plan.rows[now, b]
                    coef[place], meta[place], edited[place] = plan.coef[r], plan.meta[r], plan.edited[r]
                    rows[0, place], tick[place] = place, now
                    time[place], weights[place, : plan.branches] = plan.time[now, b], plan.weights[now, b]
        return cls(coef, meta, edited, rows, tick, time, weights)


class Places:
    """Buffers for R samples with S history slots and J branches.

    leaves        x [R, ...], history [S, R, ...], model_input [J, R, ...] of every tensor of the state
    aux           the known endpoint per leaf, [R, ...] or None
    conditioning  tensors [J * R, ...], or pytrees of them, by name
    bad           [R] int32: the first call after which a sample was not finite, -1 while it is
    source        [J, R] int32, for `ModelCalls`

    leaves, aux and conditioning of any number of samples are given as examples of dtypes and trailing sizes.
    """

    def __init__(self, leaves: list[Leaf], aux: list[Tensor | None], conditioning: dict, R: int, S: int, J: int):
        new = lambda like, known, *sizes: like.new_zeros(*sizes, *like.shape[known:])
        device = leaves[0].x.device
        integers = lambda *sizes: torch.zeros(sizes, dtype=torch.int32, device=device)
        self.sizes = R, S, J
        self.leaves = [
            Leaf(new(o.x, 1, R), new(o.history, 2, S, R), new(o.model_input, 2, J, R), integers(1)) for o in leaves
        ]
        self.aux = [None if u is None else new(u, 1, R) for u in aux]
        self.conditioning = tree_map(lambda t: new(t, 1, J * R) if torch.is_tensor(t) else t, conditioning)
        self.seed, self.bad, self.source = integers(R).long(), integers(R), integers(J, R)
        self._coef = self.leaves[0].x.new_zeros(R, len(COEF))
        self._rows = integers(1, R)
        self._metas = [integers(R, len(META)) for _ in leaves]
        self._offsets = [stream_offset(k, device) for k in range(len(leaves))]
        self._steps = [
            bind(o.x, o.history, o.model_input, o.tick, self.source, u, self._coef, meta, self._rows, self.seed)
            for o, u, meta in zip(self.leaves, self.aux, self._metas, strict=True)
        ]

    def enlarged(self, R: int, S: int, J: int) -> "Places":
        """More places, slots or branches, with what these hold."""
        new = Places(self.leaves, self.aux, self.conditioning, R, S, J)
        r, s, j = self.sizes
        for own, old in zip(new.leaves, self.leaves, strict=True):
            own.x[:r], own.history[:s, :r], own.model_input[:j, :r] = old.x, old.history, old.model_input
        for own, old in zip(new.aux, self.aux, strict=True):
            if old is not None:
                own[:r] = old
        new.seed[:r], new.bad[:r] = self.seed, self.bad
        for own, old in _pairs(new.conditioning, self.conditioning):
            own.unflatten(0, (J, R))[:j, :r] = old.unflatten(0, (j, r))
        return new

    def put(self, at: Tensor, leaves: list[Leaf], aux: list[Tensor | None], conditioning: dict, seed: Tensor) -> None:
        """Fills the places `at` [B] with samples that begin; conditioning is that of their own number of branches."""
        for own, leaf in zip(self.leaves, leaves, strict=True):
            own.x[at] = leaf.x
            own.model_input[:, at] = leaf.model_input[:1]
        for own, u in zip(self.aux, aux, strict=True):
            if u is not None:
                own[at] = u
        for own, new in _pairs(self.conditioning, conditioning):
            branches = new.unflatten(0, (-1, len(at)))
            own.unflatten(0, (-1, self.sizes[0]))[: len(branches), at] = branches
        self.seed[at], self.bad[at] = seed, -1

    def denoised(self, line: Line, outputs: list[Tensor]) -> list[Tensor]:
        """The data that the network predicts in this call, `[R, ...]` per leaf; to be asked for before the step."""
        coef, edited = (torch.from_numpy(table).to(self._coef) for table in (line.coef, line.edited))
        return [
            predicted_data(leaf.x, u, coef, edited, output, self.source)
            for leaf, u, output in zip(self.leaves, self.aux, outputs, strict=True)
        ]

    def step(self, line: Line, outputs: list[Tensor]) -> None:
        """The step kernel on the samples of the line, whose network outputs `source` finds."""
        device = self._coef.device
        meta, tick = torch.from_numpy(line.meta).to(device), torch.from_numpy(line.tick).to(device)
        self._coef.copy_(torch.from_numpy(line.coef))
        self._rows.copy_(torch.from_numpy(line.rows))
        for k, leaf in enumerate(self.leaves):
            torch.add(meta, self._offsets[k], out=self._metas[k])
            leaf.tick.zero_()
            self._steps[k]([outputs[k]] * self.sizes[2])
        # no synchronisation: the sum of a sample with a NaN or Inf is not finite
        finite = torch.isfinite(sum(leaf.x.flatten(1).sum(1) for leaf in self.leaves))
        first = ~finite & (self._rows[0] >= 0) & (self.bad < 0)
        torch.where(first, tick, self.bad, out=self.bad)


def _pairs(own: dict, other: dict) -> list[tuple[Tensor, Tensor]]:
    """The tensors of two equally structured pytrees, side by side; their dicts may be ordered differently."""
    pairs = (zip(tree_leaves(own[name]), tree_leaves(other[name]), strict=True) for name in own)
    return [pair for group in pairs for pair in group if torch.is_tensor(pair[0])]
