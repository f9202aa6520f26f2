"""AdaRound: learns for every weight whether it is rounded down or up (Nagel et al. 2020)."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fastdiff.quant.qtensor import QTensor, code_dtype
from fastdiff.quant.ranges import limits
from fastdiff.quant.schemes import Rounding, TensorSpec

Tensor = torch.Tensor

# the sigmoid is stretched beyond 0..1 and clipped, so that it reaches both ends
_GAMMA, _ZETA = -0.1, 1.1


class LearnedRounding(nn.Module):
    """A weight whose rounding is a number in 0..1 per element while it is learned, and a decision afterwards.

    weight  [N, K]; scale, zero  [N, G] of an integer format
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor | None, spec: TensorSpec) -> None:
        super().__init__()
        self.spec, self.group = spec, weight.shape[1] // scale.shape[1]
        weight = weight.detach().float()
        self._scale = scale.repeat_interleave(self.group, 1)
        self._zero = 0.0 if zero is None else zero.float().repeat_interleave(self.group, 1)
        self.scale, self.zero = scale, zero
        ratio = weight / self._scale
        self._floor = ratio.floor()
        # the rounding starts where it reproduces the weight
        start = -torch.log((_ZETA - _GAMMA) / (ratio - self._floor - _GAMMA) - 1.0)
        self.alpha = nn.Parameter(start)
        self._nearest = ratio.round() > self._floor

    def up(self) -> Tensor:
        """How far every weight is rounded up, in 0..1."""
        return (torch.sigmoid(self.alpha) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)

    def soft(self) -> Tensor:
        """The weight [N, K] with the rounding learned so far; gradients flow to alpha."""
        return self._values(self.up())

    def codes(self, nearest: bool = False) -> QTensor:
        """The decision: up where alpha >= 0; or to the nearest code, as if nothing had been learned."""
        up = self._nearest if nearest else self.alpha >= 0
        codes = (self._floor + up + self._zero).clamp(*limits(self.spec))
        return QTensor(codes.to(code_dtype(self.spec)), self.scale, self.zero, self.spec)

    def indecision(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta: zero when every weight has decided."""
        return (1.0 - (2.0 * self.up() - 1.0).abs().pow(beta)).sum()

    def _values(self, up: Tensor) -> Tensor:
        codes = (self._floor + up + self._zero).clamp(*limits(self.spec))
        return (codes - self._zero) * self._scale


def learn(learned: list[LearnedRounding], loss: Callable[[Tensor], Tensor], samples: int, settings: Rounding) -> None:
    """Minimizes loss(rows) over the roundings; `rows` are indices of calibration samples.

    The regulariser enters after the warm-up, its exponent falls linearly. Batches come from a fixed seed.
    """
    parameters = [module.alpha for module in learned]
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    warm = int(settings.warmup * settings.iters)
    for step, rows in enumerate(_batches(samples, settings)):
        total = loss(rows)
        if step >= warm:
            done = (step - warm) / max(settings.iters - warm, 1)
            beta = settings.beta[1] + (settings.beta[0] - settings.beta[1]) * (1.0 - done)
            total = total + settings.lam * sum(module.indecision(beta) for module in learned)
        # gradients only for the roundings: the network's own parameters stay clean
        for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()


def _batches(samples: int, settings: Rounding) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.iters):
        yield torch.randperm(samples, generator=generator)[: settings.batch]
