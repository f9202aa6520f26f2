"""LTX-Video (HaCohen et al. 2024): diffusers' `LTXVideoTransformer3DModel`."""

from collections.abc import Sequence

import torch
from torch import nn

from fastdiff.models.lower.attention_checks import check_attention
from fastdiff.models.lower.context import FLOATS, pack_caption, read_text
from fastdiff.models.lower.context_block import ContextBlock, Surroundings, pack_cross, pack_self
from fastdiff.models.lower.heads import pack_feed_forward, pack_norm
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.trunk import FIRST, LAST, ContextModel, Trunk, modulations, time_of_rows, wrap_output
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor


class LoweredLTX(ContextModel):
    """An LTX-Video transformer in packed weights.

    The angles of its rotations follow from coordinates that come with each call, whatever the shape of the sample: they
    are part of the context.
    """

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._structure = Structure(module)
        self._placed: tuple[tuple, tuple[Tensor, Tensor]] | None = None
        self._embed = packer.linear("proj_in", module.proj_in, precise=FIRST)
        self._text_width = module.caption_projection.linear_1.in_features
        caption = pack_caption(packer, "caption_projection", module.caption_projection)
        blocks = enumerate(module.transformer_blocks)
        packed = tuple(_pack_block(packer, f"transformer_blocks.{i}", block) for i, block in blocks)
        self._trunk = Trunk(caption, None, packed, module.norm_out.eps)
        self._final = packer.linear("proj_out", module.proj_out, precise=LAST)
        self.temporal = TemporalTable(self._modulations, exact=exact_time)
        packer.record.add("time_embed", "temporal table", "depends on the timestep only")

    def read(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: Sequence[float | Tensor] | None = None,
        video_coords: Tensor | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Call:
        """The arguments of diffusers' forward."""
        self._structure.check()
        only_defaults(attention_kwargs=attention_kwargs)
        sample, rows, channels = hidden_states, hidden_states.shape[0], self._module.proj_in.in_features
        require(sample.dim() == 3 and sample.shape[2] == channels, f"sample: [B, N, {channels}] is needed")
        require(sample.dtype in FLOATS, f"sample is {sample.dtype}")
        text = read_text(encoder_hidden_states, encoder_attention_mask, rows, self._text_width)
        rotation = self._rotation(sample, (num_frames, height, width), rope_interpolation_scale, video_coords)
        temporal = (time_of_rows(timestep, rows),)
        return Call(sample, temporal, (*text, *rotation), wrap_output(self._module, return_dict))

    def _rotation(
        self, sample: Tensor, size: tuple, spacing: Sequence[float | Tensor] | None, coordinates: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, N, C]`, those of the last call where it had the same coordinates."""
        spacing = None if spacing is None else tuple(map(float, spacing))
        place = (tuple(sample.shape[:2]), size, spacing, None if coordinates is None else coordinates.tolist())
        if self._placed is None or self._placed[0] != place:
            require(coordinates is not None or None not in size, "num_frames, height and width are needed")
            rotation = self._module.rope(sample, *size, spacing, coordinates)
            self._placed = place, rotation
        shape = self._placed[1][0].shape
        require(shape[:2] == sample.shape[:2], f"coordinates are of {shape[1]} tokens, not of {sample.shape[1]}")
        return self._placed[1]

    def prepare(self, call: Call) -> None:
        """Nothing depends on the shapes alone."""

    def _enter(self, sample: Tensor) -> Tensor:
        return self._embed(sample, out_dtype=torch.float32)

    def _leave(self, x: Tensor, sample: Tensor) -> Tensor:
        return self._final(x, out_dtype=sample.dtype)

    def _around(self, grid: tuple[int, ...], given: tuple[Tensor, ...]) -> Surroundings:
        *mask, cos, sin = given
        return Surroundings(grid, mask[0] if mask else None, (cos, sin))

    def _modulations(self, t: Tensor) -> Tensor:
        module = self._module
        six, embedded = module.time_embed(t, batch_size=t.shape[0], hidden_dtype=module.scale_shift_table.dtype)
        return modulations(module.transformer_blocks, module, six, embedded)


def lower_ltx(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredLTX:
    """Packs an LTX-Video transformer. Raises UnsupportedError where it differs from the published architecture."""
    for i, block in enumerate(module.transformer_blocks):
        name = f"transformer_blocks.{i}"
        require(type(block).__name__ == "LTXVideoTransformerBlock", f"{name} is a {type(block).__name__}")
        for part in ("attn1", "attn2"):
            check_attention(f"{name}.{part}", getattr(block, part), {"LTXVideoAttnProcessor"})
    return LoweredLTX(module, packer, exact_time)


def _pack_block(packer: Packer, name: str, block: nn.Module) -> ContextBlock:
    # its norm2 stands before the feed-forward layer; the context is read without a norm
    norms = pack_norm(f"{name}.norm1", block.norm1), pack_norm(f"{name}.norm2", block.norm2)
    attend = pack_self(packer, f"{name}.attn1", block.attn1)
    cross = pack_cross(packer, f"{name}.attn2", block.attn2, None)
    return ContextBlock(norms, attend, cross, pack_feed_forward(packer, f"{name}.ff", block.ff))
