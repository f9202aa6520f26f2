"""Guidance that ends, sample by sample, when it no longer changes the direction (Castillo et al. 2023)."""

import math

import numpy as np
import torch

from fastdiff.carry import Carry, Hook
from fastdiff.ops.gram import gram

_CLOSED = "adaptive_guidance"  # [B] bool among the extras of the carry


class AdaptiveGuidance(Hook):
    """Stops evaluating the negative branch of a sample once both branches agree: k + T model calls for it instead of 2 T.

    threshold  cosine of the angle between the conditional and the negative output, in the space that the network predicts;
               the first call that reaches it is the last with guidance. Above 1: never
    first      model call from which on it may end

    evaluated  [B] int64: model evaluations of each sample in the last run

    Every call with two branches reads one cosine per sample back from the device. Guidance must have two branches. A
    sample's decision depends on that sample only.
    """

    def __init__(self, threshold: float = 0.991, first: int = 0) -> None:
        if not math.isfinite(threshold):
            raise ValueError(f"AdaptiveGuidance: threshold must be a finite number, got {threshold!r}")
        if first < 0:
            raise ValueError(f"AdaptiveGuidance: first must be 0 or more, got {first!r}")
        self.threshold, self.first = threshold, first
        self.evaluated = np.zeros(0, dtype=np.int64)
        self._guided = np.zeros(0, dtype=bool)

    def branches(self, carry: Carry, weights: np.ndarray) -> np.ndarray:
        """Leaves only the conditional branch to samples whose guidance has ended."""
        if carry.tick == 0 or _CLOSED not in carry.extras:
            carry.extras[_CLOSED] = torch.zeros(len(weights), dtype=torch.bool)
            self.evaluated = np.zeros(len(weights), dtype=np.int64)
        closed = carry.extras[_CLOSED].numpy()
        if weights.shape[1] == 2 and closed.any():
            weights = weights.copy()
            weights[closed & weights.any(axis=1)] = 1.0, 0.0
        self._guided = (weights != 0).all(axis=1) if weights.shape[1] == 2 else np.zeros(len(weights), dtype=bool)
        self.evaluated += (weights != 0).sum(axis=1)
        return weights

    def statistics(self, carry: Carry, outputs: list[torch.Tensor]) -> None:
        """Ends the guidance of samples whose branches agree."""
        if carry.tick < self.first or not self._guided.any():
            return
        ends = self._guided & (cosines(outputs[0], outputs[1]) >= self.threshold)
        carry.extras[_CLOSED] |= torch.from_numpy(ends)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Cosine of the angle between two tensors `[B, ...]`, per sample, in a fixed order of summation; 0 where one is 0."""
    return compared(a, b)[0]


def compared(a: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of two tensors `[B, ...]`, and |a - b| / |b|, per sample; both 0 where one is 0."""
    products = gram([a, b]).cpu().numpy()
    first, inner, second = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    divide = lambda x, y: np.divide(x, y, out=np.zeros(len(products)), where=first * second > 0)
    apart = np.sqrt(np.maximum(first + second - 2 * inner, 0))
    return divide(inner, np.sqrt(first * second)), divide(apart, np.sqrt(second))
