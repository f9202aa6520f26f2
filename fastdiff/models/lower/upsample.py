"""Nearest upsampling by two and the convolution after it, as one convolution of the small image."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.coded_layers import FusedUpsample, is_coded
from fastdiff.models.lower.layers import PackedConv, Packer

Tensor = torch.Tensor
# rows of the repeated image that a 3-tap kernel sees, gathered by the row of the small image that they repeat
_GATHER = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)


@dataclass(frozen=True)
class PackedUpsample:
    """Four convolutions of 2 x 2, one for each pixel that a pixel becomes: 4/9 of the products.

    phases  2 x 2 with padding 1, to four times the channels: those of the pixel (p, q) come (2p + q)-th
    whole   the 3 x 3 convolution, for results that are cropped; None where they never are
    """

    phases: PackedConv
    whole: PackedConv | None

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`[B, H, W, C]` to `[B, *size, N]`; the size is twice that of x, or one less."""
        if size != (2 * x.shape[1], 2 * x.shape[2]):
            repeated = ops.resample(x, "nearest2x")[:, : size[0], : size[1]]
            return self.whole(ops.copy(repeated, x.dtype))
        out = self.phases(x)  # [B, H + 1, W + 1, 4 N]
        B, high, wide, channels = out.shape
        row, n = wide * channels, channels // 4
        # window i + p of a row holds pixel 2 i + p
        shape = (B, high - 1, 2, wide - 1, 2, n)
        pixels = out.as_strided(shape, (high * row, row, row + 2 * n, channels, channels + n, 1))
        return ops.copy(pixels, out.dtype).view(B, *size, n)


def pack_upsample(packer: Packer, name: str, conv: nn.Conv2d, crops: bool) -> PackedUpsample | FusedUpsample:
    """Packs a plain convolution of 3 x 3 with padding 1."""
    if is_coded(conv):  # codes of sums of weights would be others
        return FusedUpsample(packer.conv(name, conv, upsample=2), packer.conv(f"{name} (cropped)", conv))
    phases = nn.Conv2d(
        conv.in_channels, 4 * conv.out_channels, 2, padding=1, bias=conv.bias is not None, device="meta"
    )
    phases.weight = nn.Parameter(_phase_weights(conv.weight), requires_grad=False)
    if conv.bias is not None:
        phases.bias = nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)
    whole = packer.conv(f"{name} (cropped)", conv) if crops else None
    packed = PackedUpsample(packer.conv(name, phases), whole)
    packer.give_up(conv)
    return packed


def _phase_weights(weight: Tensor) -> Tensor:
    """`[N, C, 3, 3]` to `[4 N, C, 2, 2]`, added up in float64."""
    gather = _GATHER.to(weight.device)
    return torch.einsum("pay,qbx,ncyx->pqncab", gather, gather, weight.detach().double()).flatten(0, 2).float()
