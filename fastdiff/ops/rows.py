"""A tensor seen as rows: its last dimension contiguous, all others one dimension with one stride."""

import torch


def row_stride(x: torch.Tensor) -> int | None:
    """Elements from one row to the next, or None where x cannot be seen so."""
    shape, stride = x.shape, x.stride()
    if shape[-1] > 1 and stride[-1] != 1:
        return None
    step = expected = None
    for size, own in zip(reversed(shape[:-1]), reversed(stride[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = own
        elif own != expected and x.numel():
            return None
        expected = own * size
    return shape[-1] if step is None else step
