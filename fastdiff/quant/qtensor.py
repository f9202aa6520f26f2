"""QTensor: codes, scales and the setting that made them; the reference of every quantized weight."""

import math
from dataclasses import dataclass

import torch

from fastdiff.quant import formats
from fastdiff.quant.ranges import TINY, fit, round_to
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor

GROUPS = {"nvfp4": 16, "mxfp4": 32}
MOST_STEPS = 17  # of a group's scale, where scales are nested
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized matrix: x' = (codes - zero) * scale, by groups of consecutive columns.

    codes   [N, K] int8 or uint8, one code per element (float8 for fp8_e4m3)
    scale   [N, K / group] float32
    zero    [N, K / group] uint8, or None
    spec    the setting that made it
    scale2  [] or [1] float32, the scale of the scales of nvfp4, or None
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    spec: TensorSpec
    scale2: Tensor | None = None

    @property
    def group(self) -> int:
        """Consecutive columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def bits(self) -> float:
        """Bits of storage per weight, scales included (float32; float8 for nvfp4, one byte for mxfp4)."""
        per_group = 8 if self.spec.dtype in ("nvfp4", "mxfp4") else 32
        extra = per_group + (self.spec.bits if self.zero is not None else 0)
        return self.spec.bits + extra / max(self.group, 1)

    def dequantize(self) -> Tensor:
        """The matrix in float32."""
        codes, group = self.codes, self.group
        if self.spec.dtype == "nf4":
            values = formats.from_nf4(codes)
        elif self.spec.dtype in ("nvfp4", "mxfp4"):
            values = formats.from_e2m1(codes)
        else:
            values = codes.float()
        values = values.unflatten(1, (-1, group))
        if self.zero is not None:
            values = values - self.zero[..., None]
        scale = self.scale if self.scale2 is None else self.scale * self.scale2
        return (values * scale[..., None]).flatten(1)


def group_of(spec: TensorSpec, k: int) -> int:
    """Columns per scale for rows of k columns; ValueError when k is not a multiple of it."""
    group = spec.group_size if spec.granularity == "group" else GROUPS.get(spec.dtype, k)
    if group == 0 or k % group:
        raise ValueError(
            f"quantize: rows of {k} columns cannot be cut into groups of {group}; choose a divisor of {k}"
        )
    return group


def quantize(x: Tensor, spec: TensorSpec) -> QTensor:
    """Quantizes a matrix to the nearest codes.

    x  [N, K] any float; K a multiple of the group size. An empty matrix gives an empty QTensor.

    Computed in float32. Raises ValueError for NaN and Inf.
    """
    if x.dim() != 2:
        raise ValueError(f"quantize: a matrix [N, K] expected, got {list(x.shape)}")
    x = x.detach()
    N, K = x.shape
    group = group_of(spec, K) if K else 1
    if x.numel() == 0:
        return QTensor(x.new_zeros(N, K, dtype=code_dtype(spec)), x.new_ones(N, 1).float(), None, spec)
    if spec.dtype == "nvfp4":  # its scales have a scale of the whole matrix
        return _quantize(x.float(), group, spec)
    # a few rows at a time stay in the cache: that is most of the time of a large model
    parts = [_quantize(rows.float(), group, spec) for rows in x.split(max(1, _CHUNK // K))]
    if len(parts) == 1:
        return parts[0]
    join = lambda values: None if values[0] is None else torch.cat(values)
    return QTensor(join([p.codes for p in parts]), join([p.scale for p in parts]), join([p.zero for p in parts]), spec)


def _quantize(x: Tensor, group: int, spec: TensorSpec) -> QTensor:
    if not all(math.isfinite(bound) for bound in torch.aminmax(x)):
        raise ValueError("quantize: the weight holds NaN or Inf; repair the checkpoint")
    N, K = x.shape
    rows = x.reshape(-1, group)
    if spec.dtype in _FLOATING:
        codes, scale, scale2 = _FLOATING[spec.dtype](rows)
        return QTensor(codes.view(N, K), scale.view(N, -1), None, spec, scale2)
    scale, zero = fit(rows, spec)
    if spec.range == "nested":
        return with_scale(x, _nested(scale.view(N, -1)), None, spec)
    return with_scale(x, scale.view(N, -1), None if zero is None else zero.view(N, -1), spec)


def with_scale(x: Tensor, scale: Tensor, zero: Tensor | None, spec: TensorSpec) -> QTensor:
    """Rounds a matrix to the nearest integer codes of given scales [N, G] and zero points."""
    group = x.shape[1] // scale.shape[1]
    rows = x.float().unflatten(1, (-1, group))
    codes = round_to(rows, scale[..., None], None if zero is None else zero[..., None], spec)
    return QTensor(codes.flatten(1).to(code_dtype(spec)), scale.float(), zero, spec)


def to_common_scale(made: QTensor) -> tuple[Tensor, Tensor] | None:
    """The same matrix as int8 codes [N, K] of one scale per row [N, 1]; None unless its scales are nested."""
    step = made.scale.amax(1, keepdim=True) / MOST_STEPS
    times = (made.scale / step).round()
    if made.zero is not None or made.spec.bits != 4 or not torch.allclose(times * step, made.scale, rtol=1e-6, atol=0):
        return None
    codes = made.codes.unflatten(1, (-1, made.group)).to(torch.int16) * times[..., None].to(torch.int16)
    return codes.flatten(1).to(torch.int8), step


def _nested(scale: Tensor) -> Tensor:
    """Scales [N, G] as multiples 1..17 of a step of each row: 7 * 17 = 119 stays within int8 (Lin et al. 2024, QServe)."""
    step = scale.amax(1, keepdim=True) / MOST_STEPS
    return (scale / step).round().clamp(1, MOST_STEPS) * step


def code_dtype(spec: TensorSpec) -> torch.dtype:
    """Element type of unpacked codes."""
    if spec.dtype == "fp8_e4m3":
        return torch.float8_e4m3fn
    return torch.int8 if spec.dtype in ("int8", "int4") else torch.uint8


def _quantize_e4m3(rows: Tensor) -> tuple[Tensor, Tensor, None]:
    scale = (rows.abs().amax(1) / formats.E4M3_MAX).clamp(min=TINY)
    return formats.to_e4m3(rows / scale[:, None]), scale, None


def _quantize_nf4(rows: Tensor) -> tuple[Tensor, Tensor, None]:
    scale = rows.abs().amax(1).clamp(min=TINY)
    return formats.to_nf4(rows / scale[:, None]), scale, None


def _quantize_mxfp4(rows: Tensor) -> tuple[Tensor, Tensor, None]:
    scale = formats.power_of_two_scale(rows.abs().amax(1))
    return formats.to_e2m1(rows / scale[:, None]), scale, None


def _quantize_nvfp4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    amax = rows.abs().amax(1)
    scale2 = (amax.max() / (formats.E2M1_MAX * formats.E4M3_MAX)).clamp(min=TINY)
    scale = formats.to_e4m3(amax / formats.E2M1_MAX / scale2).float()
    codes = formats.to_e2m1(rows / (scale * scale2).clamp(min=TINY)[:, None])
    return torch.where(scale[:, None] > 0, codes, 0), scale, scale2


_FLOATING = {
    "fp8_e4m3": _quantize_e4m3,
    "nf4": _quantize_nf4,
    "mxfp4": _quantize_mxfp4,
    "nvfp4": _quantize_nvfp4,
}
