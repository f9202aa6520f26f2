"""What users give to a sampler, checked before any work."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from fastdiff.conditioning import Conditioning
from fastdiff.initial import Start
from fastdiff.options import RunOptions
from fastdiff.plan import Plan, RowSettings

RUN_SETTINGS = ("aux", "hooks", "device", "dtype", "guard", "graph")


@dataclass(frozen=True, eq=False)
class Arguments:
    """All that a run needs besides the network."""

    plan: Plan
    start: Start
    conditioning: Conditioning
    options: RunOptions


def row_settings(batch: int, settings: Mapping) -> list[RowSettings]:
    """The settings of each sample, from one value for all or a list with one per sample."""
    known = RowSettings.__dataclass_fields__
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"Sampler: unknown setting {unknown[0]!r}; known are {', '.join((*known, *RUN_SETTINGS))}")
    columns = {name: _per_row(name, value, batch) for name, value in settings.items()}
    if batch == 0:
        return []
    return [RowSettings(**{name: column[b] for name, column in columns.items()}) for b in range(batch)]


def _per_row(name: str, value, batch: int) -> list:
    if not isinstance(value, list):
        return [value] * batch
    if len(value) != batch:
        raise ValueError(
            f"{name}: one value per sample expected ({batch}), got {len(value)}; give one value or {batch}"
        )
    return value


def _seeds(seed: int | Sequence[int], batch: int, device: torch.device) -> torch.Tensor:
    try:
        values = (
            [seed + b for b in range(batch)]
            if isinstance(seed, (int, np.integer))
            else [operator.index(s) for s in seed]
        )
    except TypeError:
        raise TypeError(f"seed: an integer or one integer per sample expected, got {seed!r}") from None
    if len(values) != batch:
        raise ValueError(f"seed: one per sample expected ({batch}), got {len(values)}")
    return torch.tensor([(s + 2**63) % 2**64 - 2**63 for s in values], dtype=torch.int64, device=device)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 0:
        raise ValueError(f"sample: shape must be non-negative integers [B, ...], got {shape!r}")
    return sizes


def start(shape, x, seed, device: torch.device) -> Start:
    """Where a run begins: shape or x, and the seeds, checked."""
    if (shape is None) == (x is None):
        raise ValueError("sample: give either shape or x")
    if x is None:
        sizes = _sizes(shape)
        return Start([sizes], tree_flatten(0)[1], None, _seeds(seed, sizes[0], device))
    leaves, structure = tree_flatten(x)
    if not leaves or not all(isinstance(leaf, torch.Tensor) and leaf.dim() >= 1 for leaf in leaves):
        raise TypeError("sample: x must be a tensor or a pytree of tensors with a batch dimension")
    if any(leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        raise ValueError(f"sample: tensors of x must share the batch size, got {[leaf.shape[0] for leaf in leaves]}")
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
        raise ValueError("sample: x holds NaN or Inf; give a finite state")
    return Start([tuple(leaf.shape) for leaf in leaves], structure, leaves, _seeds(seed, leaves[0].shape[0], device))
