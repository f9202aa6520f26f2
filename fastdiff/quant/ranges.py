"""Scales and zero points of rows of numbers: the largest magnitude, a percentile, or the range with the least error."""

import torch

from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

# scales below are replaced by it, so that a row of zeros or of denormals divides safely
TINY = 2.0**-120
# unsigned 8-bit codes are 0..254: less this they are int8 in -127..127, which is what kernels multiply
MIDDLE = 127


def limits(spec: TensorSpec) -> tuple[int, int]:
    """Lowest and highest code of an integer format."""
    if spec.dtype == "uint8":
        return 0, 2 * MIDDLE
    if spec.dtype == "uint4":
        return 0, 15
    high = (1 << (spec.bits - 1)) - 1
    return (-high - 1 if spec.range == "signed" else -high), high


def fit(rows: Tensor, spec: TensorSpec, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every row of an integer format.

    rows     [R, G] float, finite
    weights  [G] float, how often each column counts in a search; None counts all once
    returns  [R] float32 scales, positive (any sign but zero for range `signed`), and [R] uint8 zero points or None
    """
    rows = rows.float()
    if spec.range == "signed":
        return _fit_signed(rows, spec), None
    low, high = rows.amin(1), rows.amax(1)
    if spec.range == "percentile":
        low, high = _percentile(rows, spec.p)
    if spec.range != "mse":
        return to_scale(low, high, spec)  # `nested` begins here too
    return _search(rows, low, high, spec, weights)


def to_scale(low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point whose codes cover low..high, and zero exactly."""
    first, last = limits(spec)
    if spec.symmetric:
        # an unsigned format without zero point covers 0..high only
        top = high if first == 0 else torch.maximum(low.abs(), high.abs())
        return (top / last).clamp(min=TINY), None
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / (last - first)).clamp(min=TINY)
    return scale, (first - low / scale).round().clamp(first, last).to(torch.uint8)


def round_to(rows: Tensor, scale: Tensor, zero: Tensor | None, spec: TensorSpec) -> Tensor:
    """Integer codes as float32, ties to even; scale and zero broadcast against rows."""
    codes = (rows / scale).round()
    if zero is not None:
        codes = codes + zero
    return codes.clamp(*limits(spec))


def error(rows: Tensor, scale: Tensor, zero: Tensor | None, spec: TensorSpec, weights: Tensor | None = None) -> Tensor:
    """Sum of |x - x'|^p over every row, each column times its weight [G], [R] float32."""
    scale = scale[:, None]
    zero = None if zero is None else zero[:, None]
    codes = round_to(rows, scale, zero, spec)
    back = codes * scale if zero is None else (codes - zero) * scale
    powers = (rows - back).abs().pow(spec.p)
    return powers.sum(1) if weights is None else powers @ weights


def _search(
    rows: Tensor, low: Tensor, high: Tensor, spec: TensorSpec, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The best of `grid` ranges, each a hundredth of the full one narrower than the one before."""
    scale, zero = to_scale(low, high, spec)
    best = error(rows, scale, zero, spec, weights)
    for step in range(1, min(spec.grid, 99)):
        keep = 1.0 - step / 100
        s, z = to_scale(low * keep, high * keep, spec)
        found = error(rows, s, z, spec, weights)
        better = found < best
        best = torch.where(better, found, best)
        scale = torch.where(better, s, scale)
        zero = None if zero is None else torch.where(better, z, zero)
    return scale, zero


def _fit_signed(rows: Tensor, spec: TensorSpec) -> Tensor:
    """The value of largest magnitude becomes the lowest code, whatever its sign."""
    extreme = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    scale = extreme / limits(spec)[0]
    return torch.where(scale.abs() < TINY, torch.full_like(scale, TINY), scale)


def _percentile(rows: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Bounds that hold p percent of the magnitudes, or p percent at either end where signs differ."""
    count = rows.shape[1]
    top = min(count, max(1, -int(-count * p // 100)))
    bound = rows.abs().kthvalue(top, dim=1).values
    return torch.maximum(rows.amin(1), -bound), torch.minimum(rows.amax(1), bound)
