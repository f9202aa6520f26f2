"""Correction of the network's output for the part of quantization noise that is predictable (PTQD, He et al. 2023)."""

import dataclasses
from typing import Any

import torch
from torch import nn

from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.steps import StepContext, time_of

Tensor = torch.Tensor

NAME = "eps_correction"


class EpsCorrection(nn.Module):
    """Noise of quantization as k * output + bias + rest, per step; the correction is (output - bias) / (1 + k).

    times  [S] float32;  k  [S] float32, not negative;  bias  [S, C] float32
    var    [S] float32, variance of the rest after correction: what a stochastic sampler need not inject again
    """

    def __init__(self, times: Tensor, k: Tensor, bias: Tensor, var: Tensor) -> None:
        super().__init__()
        for name, value in (("times", times), ("k", k), ("bias", bias), ("var", var)):
            self.register_buffer(name, value.float())

    def forward(self, out: Tensor, t: Tensor | float) -> Tensor:
        """Corrects an output [B, C, ...] of a call with the times t ([B] or one number)."""
        rows = (torch.as_tensor(t, dtype=torch.float32, device=out.device).reshape(-1, 1) - self.times).abs().argmin(1)
        over = lambda v: v.view(*v.shape, *[1] * (out.dim() - v.dim()))
        return ((out.float() - over(self.bias[rows])) / (1.0 + over(self.k[rows]))).to(out.dtype)

    def attach(self, net: nn.Module) -> Any:
        """Corrects every output of `net` from now on, as a part of it; returns the handle of the hook."""
        net.add_module(NAME, self)
        # a bound method, so that a copy of the network follows its own copy of the tables
        return net.register_forward_hook(self._after, with_kwargs=True)

    def _after(self, net: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        corrected = self(_tensor(out), time_of(args, kwargs))
        if torch.is_tensor(out):
            return corrected
        if isinstance(out, tuple):
            return (corrected, *out[1:])
        return dataclasses.replace(out, **{dataclasses.fields(out)[0].name: corrected})


def fit_correction(reference: Tensor, quantized: Tensor, data: CalibrationSet) -> EpsCorrection:
    """Fits k by regression and the bias by channel means, for every time of the calibration set.

    reference, quantized  [n, C, ...] outputs for the samples of `data`; sums in float64
    """
    step = StepContext(data.times)
    step.set(data.t)
    k, bias, var = [], [], []
    for s in range(len(data.times)):
        out, delta = reference[step.rows == s].double(), (quantized - reference)[step.rows == s].double()
        if not len(out):
            raise ValueError(f"correction: no calibration sample has the time {float(data.times[s])}")
        channels = [0, *range(2, out.dim())]
        centred = out - out.mean(channels, keepdim=True)
        moved = delta - delta.mean(channels, keepdim=True)
        slope = ((centred * moved).sum() / centred.square().sum().clamp(min=1e-30)).clamp(min=0.0)
        offset = (delta - slope * out).mean(channels)
        k.append(slope)
        bias.append(offset)
        rest = delta - slope * out - offset.view(-1, *[1] * (out.dim() - 2))
        var.append((rest / (1.0 + slope)).square().mean())
    return EpsCorrection(data.times, torch.stack(k), torch.stack(bias), torch.stack(var))


def predictions(net: nn.Module, data: CalibrationSet) -> Tensor:
    """The network's outputs for all samples, [n, C, ...]; the first tensor where it returns a tuple or diffusers' output."""
    data = data.to(next(net.parameters(), torch.zeros(())).device)
    with torch.no_grad():
        return torch.cat([_tensor(net(x, t, **cond)) for x, t, cond in data.batches()])


def _tensor(out: Any) -> Tensor:
    return out if torch.is_tensor(out) else out[0]
