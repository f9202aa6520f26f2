"""Per-sample inner products: what every data-dependent coefficient is made of."""

import torch

from fastdiff.ops import native
from fastdiff.ops.registry import op

MAX_OPERANDS = 8
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check(operands: list[torch.Tensor]) -> None:
    if not 1 <= len(operands) <= MAX_OPERANDS:
        raise ValueError(f"gram: operands must be 1 to {MAX_OPERANDS} tensors, got {len(operands)}")
    first = operands[0]
    for v in operands:
        if v.shape != first.shape or v.device != first.device or v.dim() == 0:
            raise ValueError(
                f"gram: operands must share one shape [B, ...] and device, got {[list(w.shape) for w in operands]}"
            )
        if v.dtype not in _TYPES:
            raise TypeError(f"gram: operands must be floats, got {v.dtype}")


@op(check=_check)
def gram(operands: list[torch.Tensor]) -> torch.Tensor:
    """Computes all dot products and sums of up to eight tensors, per sample.

    operands  N <= 8 x [B, ...] any float, any strides
    out       [B, N, N + 1] float64: out[b, i, j] = <v_i, v_j> for j < N, out[b, i, N] = sum(v_i)

    Products in float32 (float64 for float64 operands), partial sums in a fixed order, totals in float64.
    Empty samples give zeros.
    """
    rows = torch.stack([v.reshape(v.shape[0], -1).to(torch.float64) for v in operands], dim=1)  # [B, N, E]
    return torch.cat([rows @ rows.transpose(1, 2), rows.sum(2, keepdim=True)], dim=2)
