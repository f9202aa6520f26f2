"""Small UNets of every family, and calls that suit their configurations."""

import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.models.unet import UNet, UNetConfig

# largest error relative to the output's largest magnitude; w8a8: signal to noise in dB
EXACT, BF16, W8A8 = 1e-5, 3e-2, 25.0

SMALL = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
PLAIN = dict(
    **SMALL,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
)
CONDITIONAL = dict(
    **SMALL,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=4,
)
SDXL = dict(
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=58,
    transformer_layers_per_block=(1, 2),
)


def bundled_unet(**changes) -> nn.Module:
    torch.manual_seed(0)
    shape = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=16)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return UNet(UNetConfig(**{**shape, **blocks, **changes})).eval()


def plain_unet(**changes) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**PLAIN, **changes}).eval()


def conditional_unet(**changes) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**{**CONDITIONAL, **changes}).eval()


def inputs_of(net: nn.Module, seed: int = 0, rows: int = 3, size: tuple[int, int] = (8, 12), tokens: int = 7) -> tuple:
    """Positional and named arguments of a call, whatever the network's configuration wants."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    config, named = net.config, {}
    args = [normal(rows, config.in_channels, *size), torch.randint(0, 1000, (rows,), generator=generator)]
    if hasattr(config, "cross_attention_dim"):
        args.append(normal(rows, tokens, config.encoder_hid_dim or config.cross_attention_dim))
    kind = getattr(config, "class_embed_type", None)
    if getattr(config, "num_class_embeds", None) or kind == "timestep":
        named["class_labels"] = torch.randint(0, 5, (rows,), generator=generator)
    elif kind is not None:
        named["class_labels"] = normal(rows, 128 if kind == "identity" else 9)
    if getattr(config, "time_cond_proj_dim", None):
        named["timestep_cond"] = normal(rows, config.time_cond_proj_dim)
    if getattr(config, "addition_embed_type", None):
        named["added_cond_kwargs"] = dict(text_embeds=normal(rows, 10), time_ids=1000 * normal(rows, 6))
    return args, named


def call(net: nn.Module, *args, **named) -> torch.Tensor:
    with torch.no_grad():
        out = net(*args, **named)
    return out if isinstance(out, torch.Tensor) else out[0]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def decibels(got: torch.Tensor, expected: torch.Tensor) -> float:
    return 10 * math.log10(expected.square().mean() / (got - expected).square().mean())


def calls_of(net: nn.Module) -> dict[str, int]:
    return fastdiff.report(net).calls
