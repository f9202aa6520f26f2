"""The state before the first step: noise at the first level, buffers for history and model input."""

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from fastdiff.carry import Leaf
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.solver_step import COEF, META
from fastdiff.plan import Plan
from fastdiff.solvers.row import INITIAL_STREAM

LEAF_STREAMS = 16  # noise streams reserved per tensor of the state


def stream_offset(leaf: int, device: torch.device) -> torch.Tensor:
    offset = [LEAF_STREAMS * leaf if name.startswith("stream") else 0 for name in META]
    return torch.tensor(offset, dtype=torch.int32, device=device)


def endpoints(aux, shapes, dtype, device, plan: Plan) -> list[torch.Tensor | None]:
    """The known endpoint u per leaf, checked."""
    if aux is None:
        if any(table.coef[:, COEF.index(name)].any() for table in set(plan.tables) for name in ("d", "D")):
            raise ValueError("sample: this process has a known endpoint; give it as aux=")
        return [None] * len(shapes)
    leaves = [tensor.to(device=device, dtype=dtype).contiguous() for tensor in tree_flatten(aux)[0]]
    if [tuple(leaf.shape) for leaf in leaves] != list(shapes):
        raise ValueError(
            f"sample: aux must be shaped like the state, {list(shapes)}, got {[list(u.shape) for u in leaves]}"
        )
    return leaves


def initial_leaf(k, shape, given, u, plan: Plan, seeds, dtype, model_dtype, device) -> Leaf:
    """Allocates one tensor of the state and fills it with the given state or with noise at the first level."""
    B = shape[0]
    column = lambda values: torch.tensor(values, dtype=dtype, device=device).view(-1, *[1] * (len(shape) - 1))
    if given is not None:
        if not given.dtype.is_floating_point:
            raise TypeError(f"sample: x must be floating point, got {given.dtype}")
        x = given.detach().to(device=device, dtype=dtype, copy=True).contiguous()
    else:
        zero = torch.zeros(B, dtype=torch.int32, device=device)
        noise = philox_normal(
            seeds, zero, zero + INITIAL_STREAM + LEAF_STREAMS * k, int(np.prod(shape[1:], dtype=np.int64))
        )
        x = noise.view(shape).to(dtype) * column([table.start.sigma for table in plan.tables])
        if u is not None:
            x = x + u * column([table.start.mean for table in plan.tables])
    history = torch.zeros(plan.slots, *shape, dtype=dtype, device=device)
    scaled = x * column([table.c_in[0] for table in plan.tables])
    model_input = scaled.to(model_dtype).expand(plan.branches, *shape).contiguous()
    return Leaf(x, history, model_input, torch.zeros(1, dtype=torch.int32, device=device))
