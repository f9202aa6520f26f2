"""Smoothing: moves magnitude from activation channels into weight columns, where finer scales absorb it."""

import dataclasses

import torch
from torch import nn

from fastdiff.quant.qtensor import quantize
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

# strengths that the search tries (section 1.5.8): alpha alone, and alpha with beta = 1 - alpha
_GRID = [(i / 20, beta) for i in range(1, 20) for beta in (0.0, 1 - i / 20)]


def smooth_scale(x_amax: Tensor, w_amax: Tensor, alpha: float, beta: float | None = None) -> Tensor:
    """s_j = x_amax_j^alpha / w_amax_j^beta, [K] float32, 1 where a channel is empty (Xiao et al. 2023, eq. 4).

    x_amax, w_amax  [K] largest magnitudes of the activation channels and of the weight columns
    beta            1 - alpha when None
    """
    beta = 1.0 - alpha if beta is None else beta
    scale = x_amax.double().pow(alpha) / w_amax.double().clamp(min=1e-30).pow(beta)
    usable = torch.isfinite(scale) & (x_amax > 0) & (w_amax > 0)
    return torch.where(usable, scale, torch.ones_like(scale)).clamp(1e-5, 1e5).float()


def search_scale(
    weight: Tensor, hessian: Tensor, x_amax: Tensor, w_spec: TensorSpec, x_spec: TensorSpec | None
) -> Tensor:
    """The smoothing scale with the least expected output error among 38 strengths and none at all.

    weight   [N, K]
    hessian  [K, K] sum of x x^T over the calibration inputs
    x_amax   [K] largest magnitude of each input channel

    The error of the weights is tr(dW H dW^T); that of the activations is uniform rounding noise times the weight.
    """
    w_amax = weight.abs().amax(0)
    candidates = [torch.ones_like(w_amax)] + [smooth_scale(x_amax, w_amax, a, b) for a, b in _GRID]
    errors = [_expected_error(weight, hessian, x_amax, s, w_spec, x_spec) for s in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _expected_error(weight, hessian, x_amax, s, w_spec, x_spec) -> float:
    smoothed = weight * s
    plain = dataclasses.replace(w_spec, range="absmax") if w_spec.range == "mse" else w_spec
    delta = (quantize(smoothed, plain).dequantize() - smoothed) / s
    error = float(((delta @ hessian.float()) * delta).sum())
    if x_spec is not None:
        # one step of a row is its largest magnitude over the codes; uniform noise has a twelfth of its square
        step = float((x_amax / s).amax()) / ((1 << (x_spec.bits - 1)) - 1)
        rows = float(hessian.diagonal().sum() / x_amax.double().square().sum().clamp(min=1e-30))
        error += rows * step**2 / 12 * float(smoothed.square().sum())
    return error


def fold_into_norm(norm: nn.Module, s: Tensor) -> None:
    """Divides the output channels of a norm with an affine part by s, in place."""
    with torch.no_grad():
        norm.weight.div_(s.to(norm.weight))
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(s.to(norm.bias))


def fold_into_linear(linear: nn.Linear, s: Tensor) -> None:
    """Divides the outputs of a linear layer by s [N], in place."""
    with torch.no_grad():
        linear.weight.div_(s.to(linear.weight)[:, None])
        if linear.bias is not None:
            linear.bias.div_(s.to(linear.bias))


def fold_into_modulation(linear: nn.Linear, s: Tensor, shift: slice, scale: slice) -> None:
    """Divides norm(x) * (1 + scale) + shift by s by changing the rows of the layer that makes shift and scale.

    (1 + scale) / s = 1 + scale'  with  scale' = (scale + 1) / s - 1
    """
    with torch.no_grad():
        divisor = s.to(linear.weight)
        for rows in (shift, scale):
            linear.weight[rows] /= divisor[:, None]
            linear.bias[rows] /= divisor
        linear.bias[scale] += 1.0 / divisor - 1.0
