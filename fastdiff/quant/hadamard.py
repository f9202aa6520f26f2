"""Regular Hadamard rotation: spreads outliers over a group of channels, and keeps a constant offset where it is."""

import functools

import torch

Tensor = torch.Tensor

# every row sums to 2, so that a constant maps to a constant; the usual Sylvester form gathers it in one coefficient
_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def regular_hadamard(n: int) -> Tensor:
    """The symmetric regular Hadamard matrix of size n, [n, n] int64 of 1 and -1; n a power of 4."""
    if n < 1 or n & (n - 1) or n.bit_length() % 2 == 0:
        raise ValueError(f"regular_hadamard: the size must be a power of 4, got {n}")
    matrix = torch.ones(1, 1, dtype=torch.int64)
    while matrix.shape[0] < n:
        matrix = torch.kron(matrix, torch.tensor(_H4))
    return matrix


def block_of(k: int, group: int = 256) -> int:
    """The largest power of 4 up to `group` that divides k; 1 means that there is nothing to rotate."""
    block = 1
    while block * 4 <= group and k % (block * 4) == 0:
        block *= 4
    return block


def rotate(x: Tensor, block: int) -> Tensor:
    """Multiplies every `block` consecutive channels by the orthogonal matrix H / sqrt(block); its own inverse.

    x  [..., K], K a multiple of block; computed in x's dtype, at least float32
    """
    if block == 1:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype).unflatten(-1, (-1, block)) @ _matrix(block, dtype, str(x.device))).flatten(-2)


@functools.cache
def _matrix(block: int, dtype: torch.dtype, device: str) -> Tensor:
    return regular_hadamard(block).to(device=device, dtype=dtype) / block**0.5
