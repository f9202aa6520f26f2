"""QConv2d: a convolution on integer codes; QSplit: two of them over the parts of a concatenated input."""

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.ops.coded import Coded
from fastdiff.quant.activations import fake_quantize
from fastdiff.quant.kernels import coded_conv, conv_kernel
from fastdiff.quant.layer import QLayer
from fastdiff.quant.qtensor import QTensor
from fastdiff.quant.schemes import Scheme

Tensor = torch.Tensor


class QConv2d(QLayer):
    """A convolution without groups or dilation; dynamic ranges are measured per sample.

    Weights are kept channels-last, [N, kh, kw, C]. A kernel of fastdiff.ops computes it where one exists for the
    formats; else the dequantized weight in float32.
    """

    def __init__(self, quantized: QTensor, conv: nn.Conv2d, scheme: Scheme, channels: int | None = None) -> None:
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, _padding(conv)
        self.in_channels, self.out_channels = channels or conv.in_channels, conv.out_channels
        super().__init__(quantized, conv.bias, scheme)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, N, H', W'] in x's dtype."""
        if self._prepared is None:
            self._prepared = (self._input_enabled and conv_kernel(self)) or self._dense_product()
        return self._prepared(x)

    def dynamic_values(self, x: Tensor) -> Tensor:
        return fake_quantize(x.flatten(1), self.scheme.input).view(x.shape)

    def coded(self) -> Coded:
        """The layer for kernels that fuse it with its neighbours; raises ValueError where there are none."""
        return coded_conv(self)

    def dense(self) -> Tensor:
        """The weight [N, C, kh, kw] float32."""
        return as_images(self.codes().dequantize(), self.kernel_size)

    def _dense_product(self):
        weight = self.dense()
        return lambda x: F.conv2d(self.values_of(x), weight, self.bias, self.stride, self.padding).to(x.dtype)

    def _stored(self, codes: Tensor) -> Tensor:
        if self.scheme.weight.bits == 4:
            return super()._stored(codes)
        return codes.view(self.out_channels, *self.kernel_size, self.in_channels)


class QSplit(nn.Module):
    """One layer over a concatenated input as the sum of two, each with its own ranges (Li et al. 2023, section 4.2)."""

    def __init__(self, first: nn.Module, second: nn.Module, channels: int, dim: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.channels, self.dim = channels, dim

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; dimension `dim` of x holds the two parts one after the other."""
        first = x.narrow(self.dim, 0, self.channels)
        second = x.narrow(self.dim, self.channels, x.shape[self.dim] - self.channels)
        return self.forward_parts(first, second)

    def forward_parts(self, first: Tensor, second: Tensor) -> Tensor:
        """The same without the concatenated tensor."""
        return self.first(first) + self.second(second)


def as_matrix(weight: Tensor) -> Tensor:
    """[N, C, kh, kw] -> [N, kh * kw * C]: the order of the codes, channels innermost."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def as_images(matrix: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The inverse of `as_matrix`."""
    return matrix.unflatten(1, (*kernel, -1)).permute(0, 3, 1, 2).contiguous()


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        return tuple(k // 2 if conv.padding == "same" else 0 for k in conv.kernel_size)
    return conv.padding
