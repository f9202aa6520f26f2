"""The low-rank branch: the largest singular directions of a weight stay in floating point, the rest is quantized."""

import contextlib
from collections.abc import Iterator

import torch

from fastdiff.quant.qtensor import QTensor, quantize
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

_OVERSAMPLE = 10
_POWER_ITERATIONS = 4


def low_rank(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """up [N, r] and down [r, K] with up @ down the (nearly) best rank-r approximation, r = min(rank, N, K).

    weight  [N, K]; randomized SVD with oversampling 10 and 4 power iterations (Halko et al. 2011, algorithm 4.4) in
            float32; the same seed gives the same factors
    """
    weight = weight.float()
    N, K = weight.shape
    rank = min(rank, N, K)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(K, min(rank + _OVERSAMPLE, N, K), generator=generator).to(weight.device)
    with _one_thread():
        basis = torch.linalg.qr(weight @ probe).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(weight.T @ basis).Q
            basis = torch.linalg.qr(weight @ basis).Q
        u, s, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        root = s[:rank].sqrt()
        return (basis @ u[:, :rank]) * root, root[:, None] * v[:rank]


def split_low_rank(
    weight: Tensor, spec: TensorSpec, rank: int, iters: int, hessian: Tensor | None = None
) -> tuple[QTensor, Tensor, Tensor]:
    """Codes of the rest and the factors (up, down) of the part in floating point.

    iters    alternations: the factors are fitted to what the codes leave over, then the codes to the rest
    hessian  [K, K] sum of x x^T: the alternation with the least output error wins; None compares the weights

    Alternating may get worse, so the best round is kept.
    """
    best, least, codes = None, float("inf"), None
    for _ in range(iters):
        residual = weight if codes is None else weight - codes.dequantize()
        up, down = low_rank(residual, rank)
        codes = quantize(weight - up @ down, spec)
        delta = weight - up @ down - codes.dequantize()
        error = float(delta.square().sum() if hessian is None else ((delta @ hessian.float()) * delta).sum())
        if error < least:
            best, least = (codes, up, down), error
    return best


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The codes must not depend on how many threads factorize."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
