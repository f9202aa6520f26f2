"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): diffusers' `SD3Transformer2DModel`."""

import torch
from torch import nn

from fastdiff.models.lower.context import FLOATS, ONCE, read_pooled, read_text
from fastdiff.models.lower.heads import Modulations
from fastdiff.models.lower.joint import pack_joint_block, pack_prediction
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require, rows_of_time
from fastdiff.models.lower.patches import Positions, patchify, unpatchify
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.trunk import FIRST, wrap_output
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor


class LoweredSD3:
    """An SD3 in packed weights; modulations depend on the timestep and the pooled text and are rows of the temporal table."""

    adds = True

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._structure = Structure(module)
        self._patch = module.pos_embed.patch_size
        self._positions = Positions(module.pos_embed)
        modulations = Modulations(module.time_text_embed)
        self._embed = packer.linear("pos_embed.proj", module.pos_embed.proj, precise=FIRST)
        self._context = packer.linear("context_embedder", module.context_embedder, spare=ONCE)
        blocks = enumerate(module.transformer_blocks)
        self._blocks = [pack_joint_block(packer, f"transformer_blocks.{i}", b, modulations) for i, b in blocks]
        self._final = pack_prediction(packer, module, modulations)
        self.temporal = TemporalTable(modulations, exact=exact_time)
        packer.record.add(
            "time_text_embed, *.norm1*.linear, norm_out.linear", "temporal table", "timestep and pooled text only"
        )

    def read(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list | None = None,
        joint_attention_kwargs: dict | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> Call:
        """The arguments of diffusers' forward."""
        self._structure.check()
        only_defaults(
            block_controlnet_hidden_states=block_controlnet_hidden_states,
            joint_attention_kwargs=joint_attention_kwargs,
            skip_layers=skip_layers,
        )
        sample, channels, rows = hidden_states, self._module.pos_embed.proj.in_channels, hidden_states.shape[0]
        require(sample.dim() == 4 and sample.shape[1] == channels, f"sample: [B, {channels}, H, W] is needed")
        require(sample.dtype in FLOATS, f"sample is {sample.dtype}")
        require(all(n % self._patch == 0 for n in sample.shape[2:]), f"sizes are not multiples of {self._patch}")
        text = read_text(encoder_hidden_states, None, rows, self._module.context_embedder.in_features)
        temporal = rows_of_time(timestep, rows), read_pooled(pooled_projections, rows)
        return Call(sample, temporal, text, wrap_output(self._module, return_dict))

    def prepare(self, call: Call) -> None:
        self._positions.prepare(call.sample.shape[0], *self._grid(call.sample))

    def encode(self, text: Tensor) -> tuple[Tensor, ...]:
        """The text in the width of the blocks."""
        return (self._context(text, out_dtype=torch.float32),)

    def body(self, sample: Tensor, rows: Tensor, text: Tensor) -> Tensor:
        """`[B, C, H, W]`, the modulations and the embedded text to `[B, C', H, W]` in the sample's dtype."""
        head = self.head(sample, rows, text)
        return self.tail(self.middle(head, rows, text), head, sample, rows, text)

    def head(self, sample: Tensor, rows: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        """The tokens of the image and those of the text after the first block; only the former where it is the last."""
        positions = self._positions.table(sample.shape[0], *self._grid(sample))
        x = self._embed(patchify(sample, self._patch), residual=positions, out_dtype=torch.float32)
        text, x = self._blocks[0](text, x, rows)
        return (x,) if text is None else (x, text)

    def middle(self, head: tuple[Tensor, ...], rows: Tensor, *encoded: Tensor) -> Tensor:
        """All blocks but the first."""
        x, *text = head
        for block in self._blocks[1:]:
            *text, x = block(*text, x, rows)
        return x

    def tail(self, x: Tensor, head: tuple[Tensor, ...], sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor:
        """From the tokens of the image to the prediction."""
        return unpatchify(self._final(x, rows, torch.float32), self._patch, sample.shape[2:], sample.dtype)

    def _grid(self, sample: Tensor) -> tuple[int, int]:
        return sample.shape[2] // self._patch, sample.shape[3] // self._patch


def lower_sd3(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredSD3:
    """Packs an SD3. Raises UnsupportedError where it differs from the published architecture."""
    last = len(module.transformer_blocks) - 1
    for i, block in enumerate(module.transformer_blocks):
        require(type(block).__name__ == "JointTransformerBlock", f"transformer_blocks.{i} is a {type(block).__name__}")
        require(block.context_pre_only == (i == last), f"the text ends before the image at transformer_blocks.{i}")
    return LoweredSD3(module, packer, exact_time)
