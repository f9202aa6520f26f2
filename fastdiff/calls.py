"""The model calls of a run: which (branch, sample) pairs are evaluated, and in which pieces."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdiff.carry import Leaf
from fastdiff.conditioning import Conditioning

# more rows in one call only push activations out of the caches: the bundled DiT takes 133 ms for 40 rows at once and
# 111 ms for twice 20 (2 cores of an EPYC, 2026-11-21)
CPU_ROWS = 32


@dataclass(eq=False)
class ModelCalls:
    """Calls the network for the pairs that have a weight.

    source  [J, B] int32 on the device: the row of the output that belongs to each pair; kept up to date in place
    """

    net: Callable
    conditioning: Conditioning
    structure: object
    micro_batch: int | None
    source: torch.Tensor
    _needed: np.ndarray | None = None
    _index: torch.Tensor | None = None
    _cond: dict = field(default_factory=dict)

    def prepare(self, times: torch.Tensor, leaves: list[Leaf]) -> None:
        """Lets a network that has `prepare_schedule` compute what depends on times ([ticks, B]) and conditioning only."""
        prepare = getattr(self.net, "prepare_schedule", None)
        if prepare is not None and times.numel():
            example = tree_unflatten([leaf.model_input.flatten(0, 1) for leaf in leaves], self.structure)
            conditioning = self.conditioning.rows(self.conditioning.tensors, slice(None))
            prepare(example, times.repeat(1, self.source.shape[0]), **conditioning)

    def select(self, weights: np.ndarray) -> None:
        """Finds the pairs with a weight ([B, J], 0: not evaluated) and gathers their conditioning, if they have changed."""
        needed = weights != 0.0
        if self._needed is not None and np.array_equal(needed, self._needed):
            return
        self._needed = needed.copy()
        flat = np.flatnonzero(needed.T)  # branch after branch
        position = np.zeros(needed.size, dtype=np.int32)
        position[flat] = np.arange(flat.size)
        self.source.copy_(torch.from_numpy(position.reshape(self.source.shape)))
        self._index = None if flat.size == position.size else torch.from_numpy(flat).to(self.source.device)
        self._cond = self.conditioning.select(self._index)

    def renew(self) -> None:
        """Has the next `select` gather the conditioning again: rows of it have changed."""
        self._needed = None

    def evaluate(self, leaves: list[Leaf], time: torch.Tensor) -> list[torch.Tensor]:
        """The network's outputs for the selected pairs, one tensor of M rows per leaf. time is [B] or [B, N]."""
        J, B = self.source.shape
        if self._index is None:
            inputs = [leaf.model_input.flatten(0, 1) for leaf in leaves]
            time = time.repeat(J, *[1] * (time.dim() - 1)) if J > 1 else time
        else:
            sample = self._index % B
            inputs = [leaf.model_input[0].index_select(0, sample) for leaf in leaves]
            time = time.index_select(0, sample)
        rows = inputs[0].shape[0]
        if rows == 0:
            return inputs
        size = self.micro_batch or _rows_per_call(rows, inputs[0].device)
        parts = [self._call(inputs, time, slice(m, m + size)) for m in range(0, rows, size)]
        return parts[0] if len(parts) == 1 else [torch.cat(leaf) for leaf in zip(*parts, strict=True)]

    def _call(self, inputs: list[torch.Tensor], time: torch.Tensor, rows: slice) -> list[torch.Tensor]:
        taken = [tensor[rows] for tensor in inputs]
        x = tree_unflatten(taken, self.structure)
        outputs = tree_flatten(self.net(x, time[rows], **self.conditioning.rows(self._cond, rows)))[0]
        got = [list(getattr(output, "shape", ())) for output in outputs]
        if got != [list(tensor.shape) for tensor in taken]:
            raise ValueError(f"net: outputs like its input expected, {[list(t.shape) for t in taken]}, got {got}")
        return outputs


def _rows_per_call(rows: int, device: torch.device) -> int:
    """All rows on a GPU; on a CPU equal parts of at most CPU_ROWS."""
    parts = math.ceil(rows / CPU_ROWS) if device.type == "cpu" else 1
    return math.ceil(rows / parts)
