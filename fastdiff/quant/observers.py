"""Statistics of activations: exact bounds and a fixed sample per step, magnitudes of channels, second moments."""

import torch

from fastdiff.quant.ranges import fit, to_scale
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

_KEPT, _SHARE = 16384, 1024  # values per step that a range search looks at, and how many of them one sample gives


class RangeObserver:
    """Bounds of a tensor for every step, and for range searches some of its values and the extremes of every sample.

    Bounds are exact and do not depend on how the samples are cut into batches.

    low, high  [S] float32;  count [S] float32, how many values were seen
    """

    def __init__(self, steps: int) -> None:
        self.low, self.high = torch.full((steps,), float("inf")), torch.full((steps,), float("-inf"))
        self.count = torch.zeros(steps)
        self._values: list[list[Tensor]] = [[] for _ in range(steps)]
        self._extremes: list[list[Tensor]] = [[] for _ in range(steps)]

    def update(self, x: Tensor, rows: Tensor) -> None:
        """Takes x [B, ...] in; rows [B] or [1] are the steps of its samples."""
        flat = x.detach().float().reshape(x.shape[0], -1)
        rows = (rows.expand(x.shape[0]) if rows.numel() == 1 else rows).cpu()
        extremes = torch.stack((flat.amin(1), flat.amax(1)), 1).cpu()  # [B, 2]
        self.low.scatter_reduce_(0, rows, extremes[:, 0], "amin")
        self.high.scatter_reduce_(0, rows, extremes[:, 1], "amax")
        self.count.index_add_(0, rows, torch.full(rows.shape, float(flat.shape[1])))
        # a stride that is no multiple of the row length visits all channels and positions
        stride = max(1, flat.shape[1] // _SHARE) | 1
        for row, values, ends in zip(rows.tolist(), flat[:, ::stride], extremes, strict=True):
            self._extremes[row].append(ends)
            if sum(part.numel() for part in self._values[row]) < _KEPT:
                self._values[row].append(values.cpu().clone())

    def table(self, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
        """Scale [S] and zero point [S] (or None) of every step; [1] unless the setting has one range per step."""
        low, high, count, values, extremes = self.low, self.high, self.count, self._values, self._extremes
        if not spec.per_step:
            low, high, count = low.amin(0, keepdim=True), high.amax(0, keepdim=True), count.sum(0, keepdim=True)
            values, extremes = [sum(values, [])], [sum(extremes, [])]
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise ValueError("quantize: a step has no calibration samples, or its activations hold NaN or Inf")
        if spec.range in ("absmax", "signed"):
            return to_scale(low, high, spec)
        known = zip(values, extremes, count.tolist(), strict=True)
        fitted = [_fit_sample(torch.cat(v), torch.cat(e), seen, spec) for v, e, seen in known]
        zero = None if fitted[0][1] is None else torch.cat([z for _, z in fitted])
        return torch.cat([s for s, _ in fitted]), zero

    def drift(self) -> float:
        """Largest over smallest magnitude of the steps: above 4, one range for all steps wastes codes."""
        top = torch.maximum(self.low.abs(), self.high.abs())
        return float(top.max() / top.min().clamp(min=1e-30))


def _fit_sample(values: Tensor, extremes: Tensor, seen: float, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale [1] and zero point [1] or None for `seen` values, of which some and the extremes of every sample are known.

    An extreme counts as the one value that it is: with the weight of a drawn one it would decide the search alone.
    """
    if spec.range == "percentile":
        return fit(values[None], spec)
    weights = torch.ones(values.numel() + extremes.numel())
    weights[values.numel() :] = min(1.0, values.numel() / seen)
    return fit(torch.cat((values, extremes))[None], spec, weights)


class ChannelObserver:
    """Largest magnitude [K] and second moments [K, K] of the inputs of a linear layer, in float64."""

    def __init__(self, moments: bool) -> None:
        self.amax: Tensor | None = None
        self.hessian: Tensor | None = None
        self._moments = moments

    def update(self, x: Tensor) -> None:
        """Takes inputs [..., K] in."""
        rows = x.detach().float().reshape(-1, x.shape[-1])
        amax = rows.abs().amax(0)
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)
        if self._moments:
            moments = (rows.T @ rows).double()
            self.hessian = moments if self.hessian is None else self.hessian + moments
