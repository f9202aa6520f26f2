"""Which precision a reference computes in, and what it returns."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def widen(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """float32 copies for computation; float64 stays, so that a reference can be asked for the truth."""
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]


def result_dtype(x: torch.Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """What an op on x returns when asked for `out_dtype`: float64 for float64."""
    return x.dtype if x.dtype == torch.float64 else out_dtype
