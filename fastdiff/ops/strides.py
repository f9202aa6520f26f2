"""A tensor seen as [batch, channels, elements]: the only layout that native kernels know."""

import torch


def sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """The batch, the channels (second dimension) and the product of the other dimensions; absent ones count as 1."""
    B, C = x.shape[0], x.shape[1] if x.dim() > 1 else 1
    return B, C, x.shape[2:].numel()


def strides(x: torch.Tensor) -> tuple[int, int, int] | None:
    """Strides of that view in elements, or None where the last dimensions are not evenly spaced."""
    shape, stride = x.shape, x.stride()
    if x.numel() == 0:
        return 0, 0, 1
    inner = expected = None
    for size, step in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):
        if size == 1:
            continue
        if inner is None:
            inner = step
        elif step != expected:
            return None
        expected = step * size
    return stride[0], stride[1] if x.dim() > 1 else 0, 1 if inner is None else inner


def evenly_strided(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """x and its strides; a contiguous copy of x where its own cannot be expressed."""
    own = strides(x)
    if own is None:
        x = x.contiguous()
        own = strides(x)
    return x, own
