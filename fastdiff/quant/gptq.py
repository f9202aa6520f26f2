"""GPTQ: rounds column after column and moves each column's error into the columns that are still to come."""

import torch

from fastdiff.quant.qtensor import QTensor, code_dtype, group_of
from fastdiff.quant.ranges import fit, round_to
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

_RETRIES = 250


def gptq(weight: Tensor, hessian: Tensor, spec: TensorSpec, damp: float = 0.01, block: int = 128) -> QTensor:
    """Codes with a small error in the norm of the calibration inputs (Frantar et al. 2023, algorithm 1).

    weight   [N, K] float
    hessian  [K, K] sum of x x^T over the calibration inputs, any positive factor
    damp     share of the mean diagonal added to the diagonal
    block    columns whose errors are moved to the rest of the matrix at once

    Scales are those of the unchanged weight. Computed in float32, the inverse in float64.
    """
    weight = weight.detach().float()
    N, K = weight.shape
    group = group_of(spec, K)
    scale, zero = fit(weight.reshape(-1, group), spec)
    scale, zero = scale.view(N, -1), None if zero is None else zero.view(N, -1)
    factor = _inverse_factor(hessian, damp).float()
    work, codes = weight.clone(), torch.zeros_like(weight)
    for begin in range(0, K, block):
        end = min(begin + block, K)
        errors = weight.new_zeros(N, end - begin)
        for k in range(begin, end):
            s, z = scale[:, k // group], None if zero is None else zero[:, k // group]
            codes[:, k] = round_to(work[:, k], s, z, spec)
            back = codes[:, k] * s if z is None else (codes[:, k] - z) * s
            errors[:, k - begin] = (work[:, k] - back) / factor[k, k]
            work[:, k + 1 : end] -= errors[:, k - begin, None] * factor[None, k, k + 1 : end]
        work[:, end:] -= errors @ factor[begin:end, end:]
    return QTensor(codes.to(code_dtype(spec)), scale, zero, spec)


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, [K, K] float64."""
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that never was anything but zero
    step = damp * float(diagonal.mean())
    for _ in range(_RETRIES):
        diagonal += step
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
    raise ValueError("gptq: the Hessian is not positive definite; the calibration inputs hold NaN or Inf")
