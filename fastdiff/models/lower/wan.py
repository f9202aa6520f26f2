"""Wan (Wan et al. 2025), text to video: diffusers' `WanTransformer3DModel`."""

import torch
from torch import nn

from fastdiff.models.lower.attention_checks import check_attention
from fastdiff.models.lower.context import FLOATS, pack_caption, read_text
from fastdiff.models.lower.context_block import ContextBlock, Surroundings, pack_cross, pack_self
from fastdiff.models.lower.heads import pack_feed_forward, pack_norm
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require
from fastdiff.models.lower.patches import patchify, unpatchify
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.trunk import FIRST, LAST, ContextModel, Trunk, modulations, time_of_rows, wrap_output
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor


class LoweredWan(ContextModel):
    """A Wan transformer in packed weights.

    Patches span one frame, so that a video is an image whose frames lie below each other.
    """

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._structure = Structure(module)
        self._patch = module.patch_embedding.kernel_size[1]
        self._rotations: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._embed = packer.linear("patch_embedding", module.patch_embedding, precise=FIRST)
        embedder = module.condition_embedder
        self._text_width = embedder.text_embedder.linear_1.in_features
        caption = pack_caption(packer, "condition_embedder.text_embedder", embedder.text_embedder)
        packed = tuple(_pack_block(packer, f"blocks.{i}", block) for i, block in enumerate(module.blocks))
        self._trunk = Trunk(caption, None, packed, module.norm_out.eps)
        self._final = packer.linear("proj_out", module.proj_out, precise=LAST)
        self.temporal = TemporalTable(self._modulations, exact=exact_time)
        packer.record.add("condition_embedder.time_*", "temporal table", "depends on the timestep only")

    def read(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
    ) -> Call:
        """The arguments of diffusers' forward."""
        self._structure.check()
        only_defaults(encoder_hidden_states_image=encoder_hidden_states_image, attention_kwargs=attention_kwargs)
        sample, channels = hidden_states, self._module.patch_embedding.in_channels
        require(sample.dim() == 5 and sample.shape[1] == channels, f"sample: [B, {channels}, F, H, W] is needed")
        require(sample.dtype in FLOATS, f"sample is {sample.dtype}")
        require(all(n % self._patch == 0 for n in sample.shape[3:]), f"sizes are not multiples of {self._patch}")
        longest = self._module.rope.max_seq_len
        require(max(self._grid(sample)) <= longest, f"more than {longest} positions along one side")
        rows = sample.shape[0]
        text = read_text(encoder_hidden_states, None, rows, self._text_width)
        return Call(sample, (time_of_rows(timestep, rows),), text, wrap_output(self._module, return_dict))

    def prepare(self, call: Call) -> None:
        grid = self._grid(call.sample)
        if grid not in self._rotations:
            cos, sin = self._module.rope(call.sample[:1])
            self._rotations = {grid: (cos[0, :, 0].float(), sin[0, :, 0].float())}  # programs keep what they read

    def _enter(self, sample: Tensor) -> Tensor:
        patches = patchify(sample.flatten(2, 3), self._patch)
        return self._embed(patches, out_dtype=torch.float32).unflatten(1, self._grid(sample))

    def _leave(self, x: Tensor, sample: Tensor) -> Tensor:
        tall = sample.flatten(2, 3)
        x = unpatchify(self._final(x, out_dtype=torch.float32), self._patch, tall.shape[2:], sample.dtype)
        return x.unflatten(2, (sample.shape[2], -1))

    def _around(self, grid: tuple[int, ...], given: tuple[Tensor, ...]) -> Surroundings:
        return Surroundings(grid, None, self._rotations[tuple(grid)])

    def _grid(self, sample: Tensor) -> tuple[int, int, int]:
        return sample.shape[2], sample.shape[3] // self._patch, sample.shape[4] // self._patch

    def _modulations(self, t: Tensor) -> Tensor:
        module, embedder = self._module, self._module.condition_embedder
        own = next(embedder.time_embedder.parameters(), module.scale_shift_table).dtype
        embedded = embedder.time_embedder(embedder.timesteps_proj(t).to(own)).to(module.patch_embedding.weight.dtype)
        return modulations(module.blocks, module, embedder.time_proj(embedder.act_fn(embedded)), embedded)


def lower_wan(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredWan:
    """Packs a Wan transformer. Raises UnsupportedError for those that look at an image too, or at several frames at once."""
    require(module.condition_embedder.image_embedder is None, "models with an image embedder are not lowered")
    frames, *patch = module.patch_embedding.kernel_size
    require(frames == 1 and len(set(patch)) == 1, f"patches of {module.patch_embedding.kernel_size} are not lowered")
    for i, block in enumerate(module.blocks):
        require(type(block).__name__ == "WanTransformerBlock", f"blocks.{i} is a {type(block).__name__}")
        for part in ("attn1", "attn2"):
            check_attention(f"blocks.{i}.{part}", getattr(block, part), {"WanAttnProcessor"})
    return LoweredWan(module, packer, exact_time)


def _pack_block(packer: Packer, name: str, block: nn.Module) -> ContextBlock:
    # its norm2 stands before attention to the context
    norms = pack_norm(f"{name}.norm1", block.norm1), pack_norm(f"{name}.norm3", block.norm3)
    attend = pack_self(packer, f"{name}.attn1", block.attn1)
    cross = pack_cross(packer, f"{name}.attn2", block.attn2, pack_norm(f"{name}.norm2", block.norm2))
    return ContextBlock(norms, attend, cross, pack_feed_forward(packer, f"{name}.ffn", block.ffn))
