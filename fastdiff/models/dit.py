"""Class-conditional diffusion transformer (Peebles and Xie 2023) with the names and the arithmetic of diffusers'
`DiTTransformer2DModel`."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .embeddings import (
    TimestepEmbedding,
    check_eps,
    check_integers,
    check_switches,
    config_from_dict,
    grid_sinusoid,
    rows_of_timesteps,
    timestep_sinusoid,
)

Tensor = torch.Tensor
TIME_CHANNELS = 256


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT; the names and the defaults are those of diffusers' config.json."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5

    FIXED: ClassVar[dict[str, tuple]] = {
        "dropout": (0.0,),
        "norm_num_groups": tuple(range(1, 1025)),
        "activation_fn": ("gelu-approximate",),
        "upcast_attention": (False,),
        "norm_type": ("ada_norm_zero",),
        "norm_elementwise_affine": (False,),
    }

    def __post_init__(self) -> None:
        check_integers(
            "DiTConfig",
            65536,
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=self.attention_head_dim,
            in_channels=self.in_channels,
            out_channels=self.in_channels if self.out_channels is None else self.out_channels,
            num_embeds_ada_norm=self.num_embeds_ada_norm,
        )
        check_integers(
            "DiTConfig",
            1024,
            num_layers=self.num_layers,
            sample_size=self.sample_size,
            patch_size=self.patch_size,
        )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"DiTConfig: sample_size must be a multiple of patch_size, got {self.sample_size} and {self.patch_size}"
            )
        if self.hidden % 4 or self.hidden > 65536:
            raise ValueError(
                f"DiTConfig: heads times head size must be a multiple of 4 up to 65536, got {self.hidden}"
            )
        check_switches("DiTConfig", attention_bias=self.attention_bias)
        check_eps("DiTConfig", self.norm_eps)

    @property
    def hidden(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DiTConfig":
        """Read a diffusers config.json; ValueError names the first entry that is not supported."""
        return config_from_dict(cls, values)


class DiT(nn.Module):
    """Predict from the noisy images, the timesteps and the labels; the label `num_classes` means no class."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = PatchEmbed(config)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.hidden, eps=1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(config.hidden, 2 * config.hidden)
        self.proj_out_2 = nn.Linear(config.hidden, config.patch_size**2 * out_channels)

    @property
    def null_label(self) -> int:
        """The label that stands for no class in classifier-free guidance."""
        return self.config.num_embeds_ada_norm

    def forward(self, x: Tensor, t: Tensor | float, class_labels: Tensor) -> Tensor:
        """Return the prediction in the dtype of `x`.

        x             `[B, in_channels, sample_size, sample_size]`
        t             `[B]` or one number, in units of training steps, may be fractional
        class_labels  `[B]` int64, 0..num_classes, the last one means no class
        """
        sinusoid = timestep_sinusoid(rows_of_timesteps(t, x), TIME_CHANNELS, flip_sin_to_cos=True, freq_shift=1)
        sinusoid = sinusoid.to(x.dtype)
        tokens = self.pos_embed(x)
        for block in self.transformer_blocks:
            tokens = block(tokens, sinusoid, class_labels)
        # the output layer has no embedder of its own, it takes the first block's
        conditioning = self.transformer_blocks[0].norm1.emb(sinusoid, class_labels)
        shift, scale = self.proj_out_1(F.silu(conditioning))[:, None].chunk(2, dim=2)
        tokens = self.norm_out(tokens) * (1 + scale) + shift
        return self._unpatchify(self.proj_out_2(tokens))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        side, p = self.config.sample_size // self.config.patch_size, self.config.patch_size
        patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # [B, y, x, py, px, C]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Cut the image into patches, project each to a token, add its position."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden, config.patch_size, stride=config.patch_size)
        table = grid_sinusoid(config.hidden, config.sample_size // config.patch_size)
        self.register_buffer("pos_embed", table[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)  # [B, N, hidden]
        return (tokens + self.pos_embed).to(tokens.dtype)


class DiTBlock(nn.Module):
    """Attention and feed-forward, each with shift, scale and gate from (timestep, label)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = AdaNormZero(config.hidden, config.num_embeds_ada_norm)
        self.attn1 = SelfAttention(config.hidden, config.num_attention_heads, config.attention_bias)
        self.norm3 = nn.LayerNorm(config.hidden, eps=config.norm_eps, elementwise_affine=False)
        self.ff = FeedForward(config.hidden)

    def forward(self, tokens: Tensor, sinusoid: Tensor, class_labels: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = self.norm1(sinusoid, class_labels)
        tokens = tokens + gate_attn * self.attn1(self.norm1.norm(tokens) * (1 + scale_attn) + shift_attn)
        return tokens + gate_ff * self.ff(self.norm3(tokens) * (1 + scale_ff) + shift_ff)


class AdaNormZero(nn.Module):
    """The six modulation vectors of a block, each `[B, 1, hidden]`, and the norm of its first half."""

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.emb = TimeLabelEmbedding(hidden, num_classes)
        self.linear = nn.Linear(hidden, 6 * hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)

    def forward(self, sinusoid: Tensor, class_labels: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(self.emb(sinusoid, class_labels)))[:, None].chunk(6, dim=2)


class TimeLabelEmbedding(nn.Module):
    """Sum of the embedded timestep and the embedded label."""

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_CHANNELS, hidden)
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden)})

    def forward(self, sinusoid: Tensor, class_labels: Tensor) -> Tensor:
        return self.timestep_embedder(sinusoid) + self.class_embedder["embedding_table"](class_labels)


class SelfAttention(nn.Module):
    """Multi-head self-attention over `[B, N, width]`."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        # a list because diffusers keeps a dropout at index 1
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear to four times the width, GELU (tanh form), linear back."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_ProjGELU(hidden, 4 * hidden), nn.Identity(), nn.Linear(4 * hidden, hidden)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class _ProjGELU(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")
