"""The networks that are timed: diffusers' classes at published sizes with seeded random weights, and the bundled ones."""

from collections.abc import Callable

import torch
from torch import nn

SEED = 0


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Builds with fixed random weights, whatever the state of the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build().eval().requires_grad_(False)


def dit(heads: int, head_dim: int, layers: int, size: int, classes: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        attention_bias=True,
        sample_size=size,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=classes,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )


def sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def ddpm() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=32,
    )


def pixart_sigma(blocks: int, size: int) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=1152,
        caption_channels=4096,
        sample_size=size,
        use_additional_conditions=False,
    )


def wan(blocks: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, text_dim=4096, ffn_dim=8960, num_layers=blocks
    )


def ltx(blocks: int) -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(num_layers=blocks)


def sana(blocks: int) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        num_attention_heads=36,
        num_layers=blocks,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    )


def sd3_medium(blocks: int) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        num_layers=blocks, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )


def flux(double: int, single: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)


def vae_decoder() -> nn.Module:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**kinds, block_out_channels=(128, 256, 512, 512), layers_per_block=2).decoder


def bundled(name: str) -> nn.Module:
    from fastdiff.models.load import load_model

    return load_model(f"bundled:{name}").net
