"""PixArt-Alpha and PixArt-Sigma (Chen et al. 2023, 2024): diffusers' `PixArtTransformer2DModel`."""

import torch
from torch import nn

from fastdiff.models.lower.attention_checks import check_attention
from fastdiff.models.lower.context import pack_caption, read_text
from fastdiff.models.lower.context_block import ContextBlock, pack_cross, pack_self
from fastdiff.models.lower.context_image import ImageModel
from fastdiff.models.lower.heads import pack_feed_forward, pack_norm
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require, rows_of_time
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.trunk import Trunk, modulations, wrap_output
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0"}


class LoweredPixArt(ImageModel):
    """A PixArt in packed weights. Its modulations are rows of the temporal table; 1024-pixel models of PixArt-Alpha also
    take the resolution and the aspect ratio of the image, which are part of the row."""

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._structure = Structure(module)
        super().__init__(module, packer, "pos_embed")
        caption = module.caption_projection
        self._text_width = module.transformer_blocks[0].attn2.to_k.in_features
        if caption is not None:
            self._text_width = caption.linear_1.in_features
            caption = pack_caption(packer, "caption_projection", caption)
        blocks = enumerate(module.transformer_blocks)
        packed = tuple(_pack_block(packer, f"transformer_blocks.{i}", block) for i, block in blocks)
        self._trunk = Trunk(caption, None, packed, module.norm_out.eps)
        self.temporal = TemporalTable(self._modulations, exact=exact_time)
        packer.record.add("adaln_single", "temporal table", "depends on the timestep only")

    def read(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict | None = None,
        cross_attention_kwargs: dict | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Call:
        """The arguments of diffusers' forward."""
        self._structure.check()
        only_defaults(cross_attention_kwargs=cross_attention_kwargs, attention_mask=attention_mask)
        sample = hidden_states
        self._check(sample)
        rows = sample.shape[0]
        text = read_text(encoder_hidden_states, encoder_attention_mask, rows, self._text_width)
        temporal = (rows_of_time(timestep, rows), *self._conditions(added_cond_kwargs or {}, rows))
        return Call(sample, temporal, text, wrap_output(self._module, return_dict))

    def _conditions(self, added: dict, rows: int) -> tuple[Tensor, ...]:
        if not self._module.use_additional_conditions:
            return ()
        given = tuple(added.get(name) for name in ("resolution", "aspect_ratio"))
        for value in given:
            fits = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
            require(fits, f"added_cond_kwargs: resolution and aspect_ratio of {rows} rows are needed")
        return given

    def _modulations(self, t: Tensor, *conditions: Tensor) -> Tensor:
        module = self._module
        added = dict(zip(("resolution", "aspect_ratio"), conditions, strict=False)) or None
        dtype = module.scale_shift_table.dtype
        six, embedded = module.adaln_single(t, added, batch_size=t.shape[0], hidden_dtype=dtype)
        return modulations(module.transformer_blocks, module, six, embedded)


def lower_pixart(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredPixArt:
    """Packs a PixArt. Raises UnsupportedError where it differs from the published architecture."""
    for i, block in enumerate(module.transformer_blocks):
        name = f"transformer_blocks.{i}"
        require(type(block).__name__ == "BasicTransformerBlock", f"{name} is a {type(block).__name__}")
        require(block.norm_type == "ada_norm_single", f"{name} has norm_type {block.norm_type}")
        plain = block.pos_embed is None and not block.only_cross_attention and not hasattr(block, "fuser")
        require(plain and block.attn2 is not None, f"{name} is not a block of PixArt")
        for part in ("attn1", "attn2"):
            check_attention(f"{name}.{part}", getattr(block, part), _PROCESSORS)
    return LoweredPixArt(module, packer, exact_time)


def _pack_block(packer: Packer, name: str, block: nn.Module) -> ContextBlock:
    # its norm2 stands before the feed-forward layer; the context is read without a norm
    norms = pack_norm(f"{name}.norm1", block.norm1), pack_norm(f"{name}.norm2", block.norm2)
    attend = pack_self(packer, f"{name}.attn1", block.attn1)
    cross = pack_cross(packer, f"{name}.attn2", block.attn2, None)
    return ContextBlock(norms, attend, cross, pack_feed_forward(packer, f"{name}.ff", block.ff))
