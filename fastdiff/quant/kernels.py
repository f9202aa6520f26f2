"""Which kernel of fastdiff.ops computes a quantized layer: the formats decide, None where there is none."""

from collections.abc import Callable
from typing import Any

import torch

from fastdiff import ops
from fastdiff.ops import packing
from fastdiff.quant.activations import static_codes

Tensor = torch.Tensor
Kernel = Callable[[Tensor], Tensor]

# 127 * 127 * this is the largest int32: sums of more products of codes could wrap
MOST_PRODUCTS = 133_144


def linear_kernel(layer: Any) -> Kernel | None:
    """A function [..., K] -> [..., N] for a QLinear, or None."""
    weight, x = layer.scheme.weight, layer.scheme.input
    per_group = {None: "linear_w4a16", "token": "linear_w4a8"}
    if layer.weight_zero is not None or weight.dtype not in ("int8", "int4") or layer.in_features > MOST_PRODUCTS:
        return None
    if weight.dtype == "int4":
        dynamic = x is None or (x.dtype == "int8" and x.dynamic and x.granularity == "token")
        name = per_group.get(None if x is None else x.granularity) if dynamic else None
        whole_steps = layer.in_features // (layer.weight_scale.numel() // layer.out_features) % 8 == 0
        return _grouped(layer, name) if name and whole_steps else None
    if weight.granularity != "channel":
        return None
    if x is None:
        return _weights_only(layer)
    if x.dtype != "int8" or not x.symmetric or x.granularity not in ("token", "tensor"):
        return None
    return _integer(layer)


def conv_kernel(layer: Any) -> Kernel | None:
    """A function [B, C, H, W] -> [B, N, H', W'] for a QConv2d, or None."""
    weight, x = layer.scheme.weight, layer.scheme.input
    square = len({*layer.kernel_size}) == len({*layer.stride}) == len({*layer.padding}) == 1
    if not square or layer.in_features > MOST_PRODUCTS or layer.weight_zero is not None:
        return None
    if weight.dtype != "int8" or weight.granularity != "channel" or x is None or x.dtype != "int8" or not x.symmetric:
        return None
    return _convolution(layer) if x.granularity in ("token", "tensor") else None


def _packed(layer: Any) -> tuple[Tensor, Tensor]:
    codes = layer.weight.flatten(1)
    return packing.pack(codes), packing.weight_sums(codes)


def _integer(layer: Any) -> Kernel:
    packed, sums = _packed(layer)
    scale, bias, n = layer.weight_scale, layer.bias, layer.out_features

    def run(x: Tensor) -> Tensor:
        dtype, x, x_scale = x.dtype, x.contiguous(), None
        if not layer.scheme.input.dynamic:
            x_scale, _ = layer.input_range(x)
        if x_scale is not None and x_scale.numel() > 1:  # samples at different steps
            x, x_scale = static_codes(x, x_scale), x_scale.expand(*x.shape[:-1], 1)[..., 0].contiguous()
        return ops.linear_w8a8(x, x_scale, packed, scale, sums, n, bias, "none", None, None, None, dtype)

    return run


def _weights_only(layer: Any) -> Kernel:
    packed, _ = _packed(layer)
    scale, bias, n = layer.weight_scale, layer.bias, layer.out_features
    return lambda x: ops.linear_w8a16(x.contiguous(), packed, scale, n, bias, "none", None, None, x.dtype)


def _grouped(layer: Any, name: str) -> Kernel:
    quantized = layer.codes()
    packed, run = packing.pack_int4(quantized.codes), getattr(ops, name)
    scale, group, bias, n = quantized.scale, quantized.group, layer.bias, layer.out_features
    return lambda x: run(x.contiguous(), packed, scale, n, group, bias, "none", None, None, x.dtype)


def _convolution(layer: Any) -> Kernel:
    codes = layer.weight.permute(0, 3, 1, 2).contiguous()  # [N, C, kh, kw]
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
