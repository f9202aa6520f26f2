"""FLUX.1 (Black Forest Labs 2024): diffusers' `FluxTransformer2DModel`."""

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.context import FLOATS, ONCE, read_pooled, read_text
from fastdiff.models.lower.heads import Modulations, Rotation, join
from fastdiff.models.lower.joint import pack_joint_block, pack_prediction
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require, rows_of_time
from fastdiff.models.lower.single import SingleBlock, pack_single_block
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.trunk import FIRST, wrap_output
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor
_SINGLE = "FluxSingleTransformerBlock"


class LoweredFlux:
    """A FLUX in packed weights; modulations depend on timestep, guidance and pooled text and are rows of the temporal table.

    Rotations follow from position ids that come with each call, whatever the shape of the sample: they are context.
    """

    adds = True

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._structure = Structure(module)
        self._placed: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        modulations = Modulations(self._embedding)
        self._guided = hasattr(module.time_text_embed, "guidance_embedder")
        self._embed = packer.linear("x_embedder", module.x_embedder, precise=FIRST)
        self._context = packer.linear("context_embedder", module.context_embedder, spare=ONCE)
        double, single = "transformer_blocks", "single_transformer_blocks"
        blocks = enumerate(module.transformer_blocks)
        self._double = [pack_joint_block(packer, f"{double}.{i}", block, modulations) for i, block in blocks]
        blocks = enumerate(module.single_transformer_blocks)
        self._single = [pack_single_block(packer, f"{single}.{i}", block, modulations) for i, block in blocks]
        self._final = pack_prediction(packer, module, modulations)
        self.temporal = TemporalTable(modulations, exact=exact_time)
        packer.record.add(
            "time_text_embed, *.norm*.linear", "temporal table", "timestep, guidance and pooled text only"
        )

    def read(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
        controlnet_block_samples: list | None = None,
        controlnet_single_block_samples: list | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Call:
        """The arguments of diffusers' forward."""
        self._structure.check()
        only_defaults(
            joint_attention_kwargs=joint_attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
        )
        sample, channels, rows = hidden_states, self._module.x_embedder.in_features, hidden_states.shape[0]
        require(sample.dim() == 3 and sample.shape[2] == channels, f"sample: [B, N, {channels}] is needed")
        require(sample.dtype in FLOATS, f"sample is {sample.dtype}")
        require((guidance is not None) == self._guided, f"guidance is {'needed' if self._guided else 'not known'}")
        text = read_text(encoder_hidden_states, None, rows, self._module.context_embedder.in_features)
        rotation = self._rotation(txt_ids, img_ids, rows, text[0].shape[1] + sample.shape[1])
        temporal = rows_of_time(timestep, rows), read_pooled(pooled_projections, rows)
        if guidance is not None:
            temporal += (rows_of_time(guidance, rows),)
        return Call(sample, temporal, (*text, *rotation), wrap_output(self._module, return_dict))

    def _rotation(
        self, txt_ids: Tensor | None, img_ids: Tensor | None, rows: int, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, N, D]`, those of the last call where it had the same ids."""
        ids = (txt_ids, img_ids)
        require(all(isinstance(part, Tensor) for part in ids), "txt_ids and img_ids are needed")
        ids = torch.cat([part[0] if part.dim() == 3 else part for part in ids])
        require(
            ids.shape == (tokens, len(self._module.pos_embed.axes_dim)), "txt_ids and img_ids do not fit the tokens"
        )
        if self._placed is None or not torch.equal(self._placed[0], ids):
            self._placed = ids, self._module.pos_embed(ids)
        return tuple(part.expand(rows, -1, -1) for part in self._placed[1])

    def prepare(self, call: Call) -> None:
        """Nothing depends on the shapes."""

    def encode(self, text: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """The text in the width of the blocks, and the rotation."""
        return self._context(text, out_dtype=torch.float32), cos, sin

    def body(self, sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor:
        """`[B, N, C]`, the modulations, the embedded text and the rotation to `[B, N, C']` in the sample's dtype."""
        head = self.head(sample, rows, *encoded)
        return self.tail(self.middle(head, rows, *encoded), head, sample, rows, *encoded)

    def head(self, sample: Tensor, rows: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """The tokens of the image and those of the text after the first block; one stream where it has only one."""
        x = self._embed(ops.copy(sample, torch.float32), out_dtype=torch.float32)
        rotation = Rotation(cos[0], sin[0])
        if not self._double:
            return (self._single[0](self._one_stream(text, x), rows, rotation),)
        text, x = self._double[0](text, x, rows, rotation)
        return x, text

    def middle(self, head: tuple[Tensor, ...], rows: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """All blocks but the first."""
        rotation, single = Rotation(cos[0], sin[0]), self._single
        if not self._double:
            return self._run_single(single[1:], head[0], rows, rotation)
        x, text = head
        for block in self._double[1:]:
            text, x = block(text, x, rows, rotation)
        return (
            x if not single else self._run_single(single, self._one_stream(text, x), rows, rotation)[:, -x.shape[1] :]
        )

    def tail(self, x: Tensor, head: tuple[Tensor, ...], sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor:
        """From the tokens to the prediction."""
        return self._final(x[:, -sample.shape[1] :], rows, sample.dtype)

    def _run_single(self, blocks: list[SingleBlock], x: Tensor, rows: Tensor, rotation: Rotation) -> Tensor:
        for block in blocks:
            x = block(x, rows, rotation)
        return x

    def _one_stream(self, text: Tensor, x: Tensor) -> Tensor:
        heads = lambda stream: stream.unflatten(2, (-1, self._module.config.attention_head_dim))
        return join((heads(text), heads(x))).flatten(2)

    def _embedding(self, t: Tensor, pooled: Tensor, *guidance: Tensor) -> Tensor:
        thousandths = (1000 * value.to(self._module.x_embedder.weight.dtype) for value in (t, *guidance))
        return self._module.time_text_embed(*thousandths, pooled)


def lower_flux(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredFlux:
    """Packs a FLUX. Raises UnsupportedError where it differs from the published architecture."""
    for part, kind in (("transformer_blocks", "FluxTransformerBlock"), ("single_transformer_blocks", _SINGLE)):
        for i, block in enumerate(getattr(module, part)):
            require(type(block).__name__ == kind, f"{part}.{i} is a {type(block).__name__}")
    return LoweredFlux(module, packer, exact_time)
