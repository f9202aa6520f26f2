"""Which kernel of fastdiff.ops computes a quantized layer: the formats decide, None where there is none."""

from collections.abc import Callable
from typing import Any

import torch

from fastdiff import ops
from fastdiff.ops import packing
from fastdiff.quant.activations import static_codes
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor
Kernel = Callable[[Tensor], Tensor]

# 127 * 127 * this is the largest int32: sums of more products of codes could wrap
MOST_PRODUCTS = 133_144


def linear_kernel(layer: Any) -> Kernel | None:
    """A function [..., K] -> [..., N] for a QLinear, or None."""
    weight, x = layer.scheme.weight, layer.scheme.input
    if layer.in_features > MOST_PRODUCTS or (x is not None and not _is_int8(x)):
        return None
    if weight.dtype == "int4" and (x is None or x.dynamic) and layer.codes().group % 8 == 0:
        return _grouped(layer, ops.linear_w4a16 if x is None else ops.linear_w4a8)
    codes = _int8_codes(layer)
    if codes is None:
        return None
    return _weights_only(layer, codes) if x is None else _integer(layer, codes)


def conv_kernel(layer: Any) -> Kernel | None:
    """A function [B, C, H, W] -> [B, N, H', W'] for a QConv2d, or None."""
    x = layer.scheme.input
    square = len({*layer.kernel_size}) == len({*layer.stride}) == len({*layer.padding}) == 1
    if not square or layer.in_features > MOST_PRODUCTS or x is None or not _is_int8(x):
        return None
    codes = _int8_codes(layer)
    return None if codes is None else _convolution(layer, codes)


def _is_int8(x: TensorSpec) -> bool:
    return x.dtype == "int8" and x.symmetric and x.granularity in ("token", "tensor")


def _int8_codes(layer: Any) -> Tensor | None:
    """Codes [N, K] int8 without zero point and with one scale per output, where the format has that form exactly."""
    made = layer.codes()
    if made.spec.dtype not in ("int8", "int4", "uint4") or made.scale.shape[1] != 1:
        return None
    # a 4-bit code less its zero point lies in -15..15
    return made.codes if made.zero is None else (made.codes.to(torch.int16) - made.zero).to(torch.int8)


def _integer(layer: Any, codes: Tensor) -> Kernel:
    packed, sums = packing.pack(codes), packing.weight_sums(codes)
    scale, bias, n = layer.weight_scale, layer.bias, layer.out_features

    def run(x: Tensor) -> Tensor:
        dtype, x, x_scale = x.dtype, x.contiguous(), None
        if not layer.scheme.input.dynamic:
            x_scale, _ = layer.input_range(x)
        if x_scale is not None and x_scale.numel() > 1:  # samples at different steps
            x, x_scale = static_codes(x, x_scale), x_scale.expand(*x.shape[:-1], 1)[..., 0].contiguous()
        return ops.linear_w8a8(x, x_scale, packed, scale, sums, n, bias, "none", None, None, None, dtype)

    return run


def _weights_only(layer: Any, codes: Tensor) -> Kernel:
    packed = packing.pack(codes)
    scale, bias, n = layer.weight_scale, layer.bias, layer.out_features
    return lambda x: ops.linear_w8a16(x.contiguous(), packed, scale, n, bias, "none", None, None, x.dtype)


def _grouped(layer: Any, run: Callable) -> Kernel:
    quantized = layer.codes()
    packed = packing.pack_int4(quantized.codes)
    scale, group, bias, n = quantized.scale, quantized.group, layer.bias, layer.out_features
    return lambda x: run(x.contiguous(), packed, scale, n, group, bias, "none", None, None, x.dtype)


def _convolution(layer: Any, codes: Tensor) -> Kernel:
    codes = codes.view(-1, *layer.kernel_size, layer.in_channels).permute(0, 3, 1, 2).contiguous()  # [N, C, kh, kw]
    packed, sums = (
        packing.pack_conv(codes, (layer.in_channels,)),
        packing.conv_weight_sums(codes, (layer.in_channels,)),
    )
    (kernel, _), (stride, _), (pad, _) = layer.kernel_size, layer.stride, layer.padding

    def run(x: Tensor) -> Tensor:
        scale = None if layer.scheme.input.dynamic else layer.input_range(x)[0].reshape(-1)
        pixels = x.permute(0, 2, 3, 1).contiguous()
        y = ops.conv2d_w8a8(
            pixels, scale, None, None, packed, layer.weight_scale, sums, layer.out_channels, kernel, stride, [pad] * 4, 1,
            layer.bias, None, None, None, x.dtype,
        )  # fmt: skip
        return y.permute(0, 3, 1, 2)

    return run
