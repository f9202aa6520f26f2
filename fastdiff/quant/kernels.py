"""A quantized layer as the kernels of fastdiff.ops take it: the formats decide, and say why where there is none."""

from collections.abc import Callable
from typing import Any

import torch

from fastdiff.ops.coded import Coded, CodedConv, CodedLinear
from fastdiff.quant.hadamard import regular_hadamard
from fastdiff.quant.qtensor import QTensor, to_common_scale
from fastdiff.quant.ranges import MIDDLE
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor
Kernel = Callable[[Tensor], Tensor]

# 127 * 127 * this is the largest int32: sums of more products of codes could wrap
MOST_PRODUCTS = 133_144


class NoKernelError(ValueError):
    """A format that no kernel computes with; the message says which."""


def coded_linear(layer: Any) -> Coded:
    """A QLinear with its smoothing, its rotation and its branches. Raises NoKernelError."""
    branches = layer.branches
    up = torch.cat([up for up, _ in branches], 1) if branches else None
    down = torch.cat([down for _, down in branches]) if branches else None
    made = _product(layer)
    rotation = None if layer.rotation == 1 else regular_hadamard(layer.rotation).float() / layer.rotation**0.5
    smooth = None if layer.smooth is None else 1 / layer.smooth
    return Coded(*made, smooth=smooth, hadamard=rotation, up=up, down=down)


def coded_conv(layer: Any) -> Coded:
    """A QConv2d. Raises NoKernelError."""
    if not len({*layer.kernel_size}) == len({*layer.stride}) == len({*layer.padding}) == 1:
        raise NoKernelError("its kernel is not square")
    codes, scale, dense, *rest = _product(layer, joint=True)
    images = lambda t: None if t is None else t.unflatten(1, (*layer.kernel_size, -1)).permute(0, 3, 1, 2).contiguous()
    return Coded(images(codes), scale, images(dense), *rest)


def linear_kernel(layer: Any) -> Kernel | None:
    """A function [..., K] -> [..., N] of what smoothing and rotation leave, or None."""
    try:
        packed = CodedLinear(Coded(*_product(layer)), torch.float32)
    except NoKernelError:
        return None
    if packed.coded.codes is None:
        return None

    def run(x: Tensor) -> Tensor:
        rows = x.reshape(1, 1, -1) if x.dim() == 1 else x.contiguous()
        return packed(rows, out_dtype=x.dtype, x_range=_range(layer, rows)).view(*x.shape[:-1], -1)

    return run


def conv_kernel(layer: Any) -> Kernel | None:
    """A function [B, C, H, W] -> [B, N, H', W'] for a QConv2d, or None."""
    try:
        coded = coded_conv(layer)
    except NoKernelError:
        return None
    if coded.inputs == "float":
        return None
    packed = CodedConv(coded, torch.float32, (layer.in_channels,), layer.stride[0], [layer.padding[0]] * 4)

    def run(x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).contiguous()
        return packed(pixels, out_dtype=x.dtype, x_range=_range(layer, pixels)).permute(0, 3, 1, 2)

    return run


def tables(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of static activations as quantize_static wants them, [1] or [S]."""
    zero = layer.input_zero
    return layer.input_scale.reshape(-1), None if zero is None else zero.reshape(-1).float() - MIDDLE


def _range(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The range of static activations for this call; None for others."""
    if layer.scheme.input is None or layer.scheme.input.dynamic:
        return None
    scale, zero = layer.input_range(x)
    return scale.reshape(-1).contiguous(), None if zero is None else zero.reshape(-1).float() - MIDDLE


def _product(
    layer: Any, joint: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, str, bool]:
    """Codes, scale, dense weight, bias, and what becomes of the inputs.

    joint  one scale per output is needed: what convolutions are computed with
    """
    inputs, offset = _inputs(layer.scheme.input)
    if layer.in_features > MOST_PRODUCTS and inputs != "float":
        raise NoKernelError(f"sums of {layer.in_features} products may exceed int32")
    made = layer.codes()
    codes, scale = _whole(made), made.scale
    if codes is not None and scale.shape[1] > 1:
        grouped = made.spec.dtype == "int4" and made.group % 8 == 0 and inputs != "static" and not joint
        if not grouped:
            codes, scale = to_common_scale(made) or (None, None)
    if codes is None and inputs != "float":
        raise NoKernelError(f"weights in {made.spec.dtype} of this grid have no integer product")
    dense = made.dequantize() if codes is None else None
    return codes, None if codes is None else scale, dense, layer.bias, inputs, offset


def _inputs(spec: TensorSpec | None) -> tuple[str, bool]:
    if spec is None:
        return "float", False
    plain = spec.granularity in ("token", "tensor")
    if plain and spec.dtype == "int8" and spec.symmetric:
        return "dynamic" if spec.dynamic else "static", False
    if plain and spec.dtype == "uint8" and not spec.dynamic and not spec.symmetric:
        return "static", True
    raise NoKernelError(f"activations in {spec.dtype} ({spec.granularity}) have no kernel")


def _whole(made: QTensor) -> Tensor | None:
    """Integer codes [N, K] int8 without zero point; None where the format has none in -127..127."""
    if made.spec.dtype not in ("int8", "int4", "uint4"):
        return None
    # a 4-bit code less its zero point lies in -15..15
    if made.zero is None:
        return made.codes.to(torch.int8)
    return (made.codes.unflatten(1, (-1, made.group)).to(torch.int16) - made.zero[..., None]).flatten(1).to(torch.int8)
