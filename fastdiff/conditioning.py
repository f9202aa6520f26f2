"""Conditioning of the branches: checked once, gathered for the rows that are evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._pytree import tree_map

from fastdiff.plan import Plan


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Keyword arguments of the network for J branches of B samples, stacked branch after branch.

    tensors  tensors whose first dimension is J * B (or pytrees of them)
    others   values that are passed on as they are
    """

    tensors: dict
    others: dict

    @classmethod
    def check(cls, cond: Mapping | None, negative: Mapping | None, batch: int, plan: Plan, device) -> "Conditioning":
        """Stacks the branches. Raises before any work when a branch is missing, or a tensor is misshaped or not finite."""
        cond = _named("cond", {} if cond is None else cond)
        if plan.branches == 1:
            branches = [("cond", cond)]
        elif negative is None:
            raise ValueError("sample: guidance needs the negative conditioning; give negative= (same keys as cond)")
        else:
            branches = [("cond", cond), ("negative", _named("negative", negative))]
            if set(branches[1][1]) != set(cond):
                raise ValueError(
                    f"sample: cond has keys {sorted(cond)}, negative has {sorted(negative)}; give the same"
                )
        tensors, others = {}, {}
        for key, value in cond.items():
            values = [branch[key] for _, branch in branches]
            for (name, _), v in zip(branches, values, strict=True):
                _check_value(f"{name}[{key!r}]", v, batch)
                _check_alike(key, value, v)
            if any(torch.is_tensor(leaf) for leaf in _leaves(value)):
                tensors[key] = tree_map(
                    lambda *v: torch.cat([t.to(device) for t in v]) if torch.is_tensor(v[0]) else v[0], *values
                )
            else:
                others[key] = value
        return cls(tensors, others)

    def select(self, index: torch.Tensor | None) -> dict:
        """The tensors of the given rows (all when None)."""
        if index is None:
            return self.tensors
        return tree_map(lambda t: t.index_select(0, index) if torch.is_tensor(t) else t, self.tensors)

    def rows(self, selected: dict, rows: slice) -> dict:
        """Keyword arguments for a slice of the selected rows."""
        return {**tree_map(lambda t: t[rows] if torch.is_tensor(t) else t, selected), **self.others}


def _named(name: str, values: object) -> dict:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"sample: {name} must map keyword arguments of the network to values, got {type(values).__name__}"
        )
    return dict(values)


def _check_alike(key: str, cond: object, negative: object) -> None:
    """Raises ValueError unless both branches can be stacked: tensors of equal shape and dtype, other values equal."""
    describe = lambda leaf: (list(leaf.shape), leaf.dtype) if torch.is_tensor(leaf) else leaf
    one, other = ([describe(leaf) for leaf in _leaves(value)] for value in (cond, negative))
    if cond is not negative and one != other:
        raise ValueError(
            f"sample: cond[{key!r}] and negative[{key!r}] must have tensors of one shape and dtype, and equal other values, "
            f"got {one} and {other}"
        )


def _leaves(value: object) -> list:
    found = []
    tree_map(found.append, value)
    return found


def _check_value(name: str, value: object, batch: int) -> None:
    for leaf in _leaves(value):
        if isinstance(leaf, np.ndarray):
            raise TypeError(f"sample: {name} must be a tensor, got a numpy array; use torch.from_numpy")
        if not torch.is_tensor(leaf):
            continue
        if leaf.dim() < 1 or leaf.shape[0] != batch:
            raise ValueError(f"sample: {name} must have first dimension {batch}, got {list(leaf.shape)}")
        if leaf.dtype.is_floating_point and not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"sample: {name} holds NaN or Inf; check the encoder that made it")
