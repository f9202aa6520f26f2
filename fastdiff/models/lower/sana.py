"""Sana (Xie et al. 2024): diffusers' `SanaTransformer2DModel`."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.attention_checks import check_attention
from fastdiff.models.lower.context import pack_caption, read_text
from fastdiff.models.lower.context_block import ContextBlock, SelfAttention, Surroundings, pack_cross, pack_self
from fastdiff.models.lower.context_image import ImageModel
from fastdiff.models.lower.heads import pack_norm
from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require, rows_of_time
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.trunk import Trunk, modulations, wrap_output
from fastdiff.models.lower.unet_blocks import as_float
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor
_EPS = 1e-15  # of the processor


class LinearAttention(SelfAttention):
    """Attention among tokens whose cost grows with their number, not with its square."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.linear_attention(q, k, v, _EPS)


@dataclass(frozen=True)
class GatedConv:
    """A feed-forward layer that sees the neighbours: 1 x 1, SiLU, 3 x 3 of every channel by itself, gate, 1 x 1."""

    first: PackedLinear
    weight: Tensor
    bias: Tensor | None
    second: PackedLinear

    def __call__(self, h: Tensor, h_scale: Tensor | None, gate: Tensor, x: Tensor, around: Surroundings) -> Tensor:
        h = self.first(h, activation="silu", x_scale=h_scale).unflatten(1, around.grid)
        h = ops.depthwise_conv2d(h, self.weight, self.bias, "swiglu", h.dtype).flatten(1, 2)
        return self.second(h, gate=gate, residual=x, out_dtype=torch.float32)


class LoweredSana(ImageModel):
    """A Sana in packed weights; models that take a guidance scale have it in the rows of their temporal table."""

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._structure = Structure(module)
        super().__init__(module, packer, "patch_embed")
        self._text_width = module.caption_projection.linear_1.in_features
        caption = pack_caption(packer, "caption_projection", module.caption_projection)
        blocks = enumerate(module.transformer_blocks)
        packed = tuple(_pack_block(packer, f"transformer_blocks.{i}", block) for i, block in blocks)
        caption_norm = pack_norm("caption_norm", module.caption_norm)
        self._trunk = Trunk(caption, caption_norm, packed, module.norm_out.norm.eps)
        self.temporal = TemporalTable(self._modulations, exact=exact_time)
        packer.record.add("time_embed", "temporal table", "depends on the timestep only")

    def read(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_kwargs: dict | None = None,
        controlnet_block_samples: tuple[Tensor, ...] | None = None,
        return_dict: bool = True,
    ) -> Call:
        """The arguments of diffusers' forward. Its blocks have no use for `attention_mask`."""
        self._structure.check()
        only_defaults(attention_kwargs=attention_kwargs, controlnet_block_samples=controlnet_block_samples)
        sample = hidden_states
        self._check(sample)
        rows = sample.shape[0]
        wanted = hasattr(self._module.time_embed, "guidance_embedder")
        require(wanted == (guidance is not None), "guidance is needed" if wanted else "guidance has no use")
        text = read_text(encoder_hidden_states, encoder_attention_mask, rows, self._text_width)
        temporal = tuple(rows_of_time(t, rows) for t in ((timestep, guidance) if wanted else (timestep,)))
        return Call(sample, temporal, text, wrap_output(self._module, return_dict))

    def _modulations(self, t: Tensor, *guidance: Tensor) -> Tensor:
        module, dtype = self._module, self._module.scale_shift_table.dtype
        more = {"guidance": guidance[0]} if guidance else {"batch_size": t.shape[0]}
        six, embedded = module.time_embed(t, **more, hidden_dtype=dtype)
        return modulations(module.transformer_blocks, module, six, embedded)


def lower_sana(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredSana:
    """Packs a Sana. Raises UnsupportedError where it differs from the published architecture."""
    for i, block in enumerate(module.transformer_blocks):
        name = f"transformer_blocks.{i}"
        require(type(block).__name__ == "SanaTransformerBlock", f"{name} is a {type(block).__name__}")
        require(getattr(block, "attn2", None) is not None, f"{name} does not look at a text")
        check_attention(f"{name}.attn1", block.attn1, {"SanaLinearAttnProcessor2_0"})
        check_attention(f"{name}.attn2", block.attn2, {"SanaAttnProcessor2_0"})
        plain = block.ff.norm is None and not block.ff.residual_connection
        require(plain, f"{name}.ff has a norm or a residual of its own")
    return LoweredSana(module, packer, exact_time)


def _pack_block(packer: Packer, name: str, block: nn.Module) -> ContextBlock:
    # its norm2 stands before the feed-forward layer; the context is read without a norm
    norms = pack_norm(f"{name}.norm1", block.norm1), pack_norm(f"{name}.norm2", block.norm2)
    attend = pack_self(packer, f"{name}.attn1", block.attn1, LinearAttention)
    cross = pack_cross(packer, f"{name}.attn2", block.attn2, None)
    return ContextBlock(norms, attend, cross, _pack_feed(packer, f"{name}.ff", block.ff))


def _pack_feed(packer: Packer, name: str, feed: nn.Module) -> GatedConv:
    first = packer.linear(f"{name}.conv_inverted", feed.conv_inverted)
    depth = feed.conv_depth
    plain = depth.kernel_size == (3, 3) and depth.padding == depth.stride == depth.dilation == (1, 1)
    require(type(depth) is nn.Conv2d and plain and depth.groups == depth.in_channels, f"{name}.conv_depth is another")
    weight = depth.weight.detach().float().flatten(1).T.contiguous()
    packer.record.add(f"{name}.conv_depth", "float32", "9 weights per channel", weight.nbytes)
    packer.give_up(depth)
    return GatedConv(first, weight, as_float(depth.bias), packer.linear(f"{name}.conv_point", feed.conv_point))
