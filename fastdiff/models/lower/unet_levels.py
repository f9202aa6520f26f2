"""The levels of a UNet: which blocks run in which order, on which skip connections."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff.models.lower.layers import PackedConv, Packer
from fastdiff.models.lower.lowered import require
from fastdiff.models.lower.unet_attention import PixelAttention, SpatialTransformer, pack_attention
from fastdiff.models.lower.unet_blocks import (
    Assembly,
    Conditions,
    ResBlock,
    check_conv,
    is_missing,
    pack_conv,
    pack_resnet,
)
from fastdiff.models.lower.upsample import PackedUpsample, pack_upsample

Tensor = torch.Tensor
_BLOCKS = {
    "down": ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "DownEncoderBlock2D", "DownBlock"),
    "mid": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "MidBlock"),
    "up": ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "UpDecoderBlock2D", "UpBlock"),
}
_SAMPLERS = {"down": ("Downsample2D", "Downsample"), "up": ("Upsample2D", "Upsample")}


@dataclass(frozen=True)
class Stage:
    """A residual block and the attention that follows it, if any."""

    resnet: ResBlock
    attention: PixelAttention | SpatialTransformer | None

    def __call__(self, x: Tensor, skip: Tensor | None, conditions: Conditions) -> Tensor:
        x = self.resnet(x, skip, conditions)
        return x if self.attention is None else self.attention(x, conditions)


@dataclass(frozen=True)
class Level:
    """The stages of one resolution, then the change to the next."""

    stages: tuple[Stage, ...]
    resample: PackedConv | PackedUpsample | None


def pack_levels(assembly: Assembly, module: nn.Module) -> tuple[list[Level], Level, list[Level]]:
    """Packs the blocks in the order in which they run, since skip connections are matched by it."""
    skips = [module.conv_in.out_channels]
    down = []
    for i, block in enumerate(module.down_blocks):
        down.append(pack_level(assembly, "down", f"down_blocks.{i}", block))
        skips += [resnet.conv2.out_channels for resnet in block.resnets]
        skips += [sampler.conv.out_channels for sampler in block.downsamplers or ()]
    mid = Level((), None)
    if module.mid_block is not None:
        mid = pack_level(assembly, "mid", "mid_block", module.mid_block)
    crops = can_crop(module, down)
    up = [pack_level(assembly, "up", f"up_blocks.{i}", b, skips, crops) for i, b in enumerate(module.up_blocks)]
    require(not skips, "skip connections are left over")
    return down, mid, up


def can_crop(module: nn.Module, down: list[Level]) -> bool:
    """Whether sizes may be odd: diffusers' conditional network then resizes to the skip connection, and only that one."""
    symmetric = all(level.resample is None or level.resample.padding == [1, 1, 1, 1] for level in down)
    return symmetric and type(module).__name__ == "UNet2DConditionModel"


def pack_level(
    assembly: Assembly, kind: str, name: str, block: nn.Module, skips: list[int] | None = None, crops: bool = False
) -> Level:
    """Packs a block; `skips` are the channels of its second segments, the last first, and it takes its own."""
    require(type(block).__name__ in _BLOCKS[kind], f"{name} is a {type(block).__name__}")
    attentions = list(getattr(block, "attentions", None) or [])
    # in the middle a residual block comes last
    attentions += [None] * (len(block.resnets) - len(attentions))
    require(len(attentions) == len(block.resnets), f"{name} has more attentions than residual blocks")
    stages = []
    for i, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
        packed = pack_resnet(assembly, f"{name}.resnets.{i}", resnet, skips.pop() if skips is not None else 0)
        stages.append(Stage(packed, pack_attention(assembly, f"{name}.attentions.{i}", attention)))
    return Level(tuple(stages), _pack_resample(assembly.packer, kind, name, block, crops))


def _pack_resample(
    packer: Packer, kind: str, name: str, block: nn.Module, crops: bool
) -> PackedConv | PackedUpsample | None:
    samplers = list(getattr(block, f"{kind}samplers", None) or [])
    require(len(samplers) <= 1, f"{name} has several {kind}samplers")
    if not samplers:
        return None
    name, sampler = f"{name}.{kind}samplers.0", samplers[0]
    require(type(sampler).__name__ in _SAMPLERS[kind], f"{name} is a {type(sampler).__name__}")
    require(is_missing(sampler, "norm") and getattr(sampler, "use_conv", True), f"{name} is not a plain convolution")
    conv = sampler.conv
    if kind == "up":
        usual = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        require(usual and getattr(sampler, "interpolate", True), f"{name} does not interpolate")
        check_conv(name, conv)
        return pack_upsample(packer, name, conv, crops)
    require(conv.stride == (2, 2) and conv.padding in ((0, 0), (1, 1)), f"{name} has another stride or padding")
    # without padding of its own, such a layer adds a row and a column of zeros at the end
    return pack_conv(packer, name, conv, padding=[1, 1, 1, 1] if conv.padding[0] else [0, 1, 0, 1])
