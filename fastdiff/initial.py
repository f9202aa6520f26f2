"""The state before the first step: noise at the first level, buffers for history and model input."""

import math
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten

from fastdiff.carry import Leaf
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.solver_step import COEF, META
from fastdiff.plan import Plan
from fastdiff.solvers.row import INITIAL_STREAM

LEAF_STREAMS = 16  # noise streams reserved per tensor of the state


def stream_offset(leaf: int, device: torch.device) -> torch.Tensor:
    """What to add to `meta` [R, 6] so that every leaf draws noise of its own."""
    offset = [LEAF_STREAMS * leaf if name.startswith("stream") else 0 for name in META]
    return torch.tensor(offset, dtype=torch.int32, device=device)


def endpoints(aux, shapes, dtype, device, plan: Plan) -> list[torch.Tensor | None]:
    """The known endpoint u per leaf, checked."""
    if aux is None:
        if any(table.coef[:, COEF.index(name)].any() for table in set(plan.tables) for name in ("d", "D")):
            raise ValueError("sample: this process has a known endpoint; give it as aux=")
        return [None] * len(shapes)
    given = tree_flatten(aux)[0]
    if not all(isinstance(tensor, torch.Tensor) and bool(torch.isfinite(tensor).all()) for tensor in given):
        raise ValueError("sample: aux must be finite tensors, shaped like the state")
    leaves = [tensor.to(device=device, dtype=dtype).contiguous() for tensor in given]
    if [tuple(leaf.shape) for leaf in leaves] != list(shapes):
        raise ValueError(
            f"sample: aux must be shaped like the state, {list(shapes)}, got {[list(u.shape) for u in leaves]}"
        )
    return leaves


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run begins: shapes of the leaves, the pytree's structure, given leaves (or None), [B] int64 seeds."""

    shapes: list[tuple[int, ...]]
    structure: object
    given: list[torch.Tensor] | None
    seed: torch.Tensor


def initial_leaves(start: Start, aux, plan: Plan, dtype: torch.dtype, model_dtype: torch.dtype) -> list[Leaf]:
    """Allocates the state and fills it with the given tensors, or with noise at the first level."""
    given = start.given or [None] * len(start.shapes)
    leaves = []
    for k, (shape, tensor, u) in enumerate(zip(start.shapes, given, aux, strict=True)):
        x = (
            _noise(k, shape, u, plan, start.seed, dtype)
            if tensor is None
            else _taken(tensor, start.seed.device, dtype)
        )
        history = torch.zeros(plan.slots, *shape, dtype=dtype, device=x.device)
        scaled = x * _column([table.c_in[0] for table in plan.tables], x)
        model_input = scaled.to(model_dtype).expand(plan.branches, *shape).contiguous()
        leaves.append(Leaf(x, history, model_input, torch.zeros(1, dtype=torch.int32, device=x.device)))
    return leaves


def _taken(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"sample: x must be floating point, got {tensor.dtype}")
    # always a copy, always contiguous: the loop writes into it
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor.detach())


def _noise(k: int, shape: tuple[int, ...], u, plan: Plan, seed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """sigma z + mean u at the first level of each sample's table."""
    step = torch.zeros_like(seed, dtype=torch.int32)
    z = philox_normal(seed, step, step + INITIAL_STREAM + LEAF_STREAMS * k, math.prod(shape[1:])).view(shape).to(dtype)
    x = z * _column([table.start.sigma for table in plan.tables], z)
    return x if u is None else x + u * _column([table.start.mean for table in plan.tables], z)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """One value per sample, shaped to multiply `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.dim() - 1))
