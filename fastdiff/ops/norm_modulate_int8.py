"""The same norm with int8 codes as its result: the input of a quantized layer in one pass."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.norm_modulate import (
    check_norm,
    norm_samples,
    normalize,
    refuse_norm,
    refuse_norm_triton,
    run_norm,
)
from fastdiff.ops.quantize_rows import row_codes
from fastdiff.ops.registry import op


def _check(x, kind, weight, bias, eps, shift, scale) -> None:
    check_norm("norm_modulate_int8", x, kind, weight, bias, shift, scale)


@op(check=_check)
def norm_modulate_int8(
    x: torch.Tensor,
    kind: str,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalizes and modulates rows, and quantizes each with its own scale.

    Arguments as in norm_modulate. Returns what quantize_rows makes of its float32 result:
    codes   [B, N, C] int8 in [-127, 127]
    scales  [B, N] float32
    """
    return row_codes(normalize(x, kind, weight, bias, eps, shift, scale))


@norm_modulate_int8.variant(
    "cpu",
    devices=("cpu",),
    missing=native.cpu_missing,
    refuse=lambda x, kind, weight, bias, eps, shift, scale: refuse_norm(x, weight, bias, shift, scale),
)
def _(x, kind, weight, bias, eps, shift, scale):
    codes, scales = memory.empty(x.shape, torch.int8), memory.empty(x.shape[:2], torch.float32)
    if x.shape[2] == 0:
        scales.zero_()
    run_norm(codes, scales, None, x, None, None, kind, weight, bias, eps, shift, scale)
    return codes, scales


@norm_modulate_int8.variant(
    "triton",
    devices=("cuda",),
    missing=native.triton_missing,
    refuse=lambda x, kind, weight, bias, eps, shift, scale: refuse_norm_triton(x, weight, bias, shift, scale),
)
def _(x, kind, weight, bias, eps, shift, scale):
    from fastdiff.kernels.norm_modulate import norm_modulate_triton

    codes = memory.empty(x.shape, torch.int8, x.device)
    scales = memory.empty(x.shape[:2], torch.float32, x.device)
    norm_modulate_triton(codes, scales, None, x, None, None, kind, weight, bias, eps, shift, scale)
    return codes, scales


@norm_modulate_int8.sample
def _(device):
    # codes at a tie may differ from float64's; those of rows with thousands of channels do
    yield from (args for args in norm_samples(device) if args[0].numel() < 1000)
