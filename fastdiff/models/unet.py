"""Unconditional UNet (Ho et al. 2020) with the names and the arithmetic of diffusers' `UNet2DModel`."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .dit import SelfAttention
from .embeddings import (
    TimestepEmbedding,
    check_eps,
    check_integers,
    check_switches,
    config_from_dict,
    rows_of_timesteps,
    timestep_sinusoid,
)

Tensor = torch.Tensor
# block name -> has attention
DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the names and the defaults are those of diffusers' config.json."""

    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: int = 1
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    add_attention: bool = True

    FIXED: ClassVar[dict[str, tuple]] = {
        "center_input_sample": (False,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "mid_block_type": ("UNetMidBlock2D",),
        "mid_block_scale_factor": (1,),
        "downsample_type": ("conv",),
        "upsample_type": ("conv",),
        "dropout": (0.0,),
        "act_fn": ("silu", "swish"),
        "attn_norm_num_groups": (None,),
        "resnet_time_scale_shift": ("default",),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "num_train_timesteps": (None,),
    }

    def __post_init__(self) -> None:
        widths = self.block_out_channels
        if not isinstance(widths, tuple) or not 1 <= len(widths) <= 16:
            raise ValueError(f"UNetConfig: block_out_channels must be a list of 1 to 16 integers, got {widths!r}")
        check_integers(
            "UNetConfig",
            65536,
            sample_size=1 if self.sample_size is None else self.sample_size,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            attention_head_dim=1 if self.attention_head_dim is None else self.attention_head_dim,
            norm_num_groups=self.norm_num_groups,
            **{f"block_out_channels[{i}]": width for i, width in enumerate(widths)},
        )
        check_integers("UNetConfig", 64, layers_per_block=self.layers_per_block)
        check_switches("UNetConfig", flip_sin_to_cos=self.flip_sin_to_cos, add_attention=self.add_attention)
        check_eps("UNetConfig", self.norm_eps)
        for key, types, table in (
            ("down_block_types", self.down_block_types, DOWN_BLOCKS),
            ("up_block_types", self.up_block_types, UP_BLOCKS),
        ):
            if not isinstance(types, tuple) or len(types) != len(widths) or any(name not in table for name in types):
                raise ValueError(f"UNetConfig: {key} must be {len(widths)} of {sorted(table)}, got {types!r}")
        if self.downsample_padding not in (0, 1) or self.freq_shift not in (0, 1):
            raise ValueError(
                "UNetConfig: downsample_padding and freq_shift must be 0 or 1, "
                f"got {self.downsample_padding!r} and {self.freq_shift!r}"
            )
        if any(width % self.norm_num_groups or width % self.head_dim(width) for width in widths):
            raise ValueError(
                f"UNetConfig: block_out_channels {widths} must be multiples of norm_num_groups "
                f"{self.norm_num_groups} and attention_head_dim {self.attention_head_dim}"
            )

    def head_dim(self, width: int) -> int:
        return width if self.attention_head_dim is None else self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UNetConfig":
        """Read a diffusers config.json; ValueError names the first entry that is not supported."""
        return config_from_dict(cls, values)


class UNet(nn.Module):
    """Predict from the noisy images and the timesteps."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the prediction in the dtype of `x`.

        x  `[B, in_channels, H, W]`, H and W multiples of 2^(levels - 1)
        t  `[B]` or one number, in units of training steps, may be fractional
        """
        config = self.config
        t = rows_of_timesteps(t, x)
        sinusoid = timestep_sinusoid(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        emb = self.time_embedding(sinusoid.to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, skips)
        x = self.mid_block(x, emb)
        for block in self.up_blocks:
            x = block(x, emb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    """Residual blocks of one level, then half the resolution unless it is the deepest level."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        ins = [widths[max(level - 1, 0)]] + [widths[level]] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResBlock(config, n, widths[level]) for n in ins)
        self.attentions = _attentions(config, DOWN_BLOCKS[config.down_block_types[level]], widths[level], len(ins))
        last = level == len(widths) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(widths[level], config.downsample_padding)])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions or [_same] * len(self.resnets), strict=True):
            x = attention(resnet(x, emb))
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(ResBlock(config, width, width) for _ in range(2))
        self.attentions = _attentions(config, config.add_attention, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Residual blocks that each take one skip connection, then twice the resolution unless it is the top level."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, count = config.block_out_channels, config.layers_per_block + 1
        width = widths[level]
        ins = [widths[min(level + 1, len(widths) - 1)]] + [width] * (count - 1)
        skips = [width] * (count - 1) + [widths[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(ResBlock(config, a + b, width) for a, b in zip(ins, skips, strict=True))
        has_attention = UP_BLOCKS[config.up_block_types[len(widths) - 1 - level]]
        self.attentions = _attentions(config, has_attention, width, count)
        self.upsamplers = nn.ModuleList([Upsample(width)] if level else [])

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions or [_same] * len(self.resnets), strict=True):
            x = attention(resnet(torch.cat((x, skips.pop()), dim=1), emb))
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class ResBlock(nn.Module):
    """Norm, SiLU, conv, plus time, norm, SiLU, conv, plus the (projected) input."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(SelfAttention):
    """Self-attention over the pixels of a feature map, with its norm before and a residual around it."""

    def __init__(self, config: UNetConfig, width: int) -> None:
        super().__init__(width, heads=width // config.head_dim(width))
        self.group_norm = nn.GroupNorm(config.norm_num_groups, width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)  # [B, N, C]
        return x + super().forward(tokens).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Convolution with stride 2; padding 0 means one row and column of zeros at the end only."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat every pixel 2 x 2, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _attentions(config: UNetConfig, wanted: bool, width: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(SpatialAttention(config, width) for _ in range(count if wanted else 0))


def _same(x: Tensor) -> Tensor:
    return x
