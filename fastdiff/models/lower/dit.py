"""Class-conditional DiT (Peebles and Xie 2023): diffusers' `DiTTransformer2DModel` and the bundled one."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models.embeddings import timestep_sinusoid
from fastdiff.models.lower.coded_layers import is_coded
from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.lowered import Call, only_defaults, output_class, require, rows_of_time
from fastdiff.models.lower.structure import Structure
from fastdiff.ops.memory import spend
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor
_FIRST = "first layer: few input channels, and its error reaches everything"
_LAST = "last layer: few output channels, and its error reaches the image"
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0"}


@dataclass(frozen=True)
class _Block:
    qkv: PackedLinear
    projection: PackedLinear
    first: PackedLinear
    second: PackedLinear
    norms_eps: tuple[float, float]


class LoweredDiT:
    """A DiT in packed weights: per block seven kernels, modulated by rows of the temporal table.

    The residual stream is float32 in every mode: it is a few percent of the traffic and keeps the error of many blocks
    from adding up.
    """

    adds = True

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._mode = packer.mode
        blocks = module.transformer_blocks
        self._heads = blocks[0].attn1.heads
        self._structure = Structure(module)
        self._pos = module.pos_embed.pos_embed
        self._positions: Tensor | None = None
        self._patch = packer.linear("pos_embed.proj", module.pos_embed.proj, precise=_FIRST)
        self._blocks = [_block(packer, f"transformer_blocks.{i}", block) for i, block in enumerate(blocks)]
        self._final = packer.linear("proj_out_2", module.proj_out_2, precise=_LAST)
        self._final_eps = module.norm_out.eps
        self.temporal = TemporalTable(self._modulations, exact=exact_time)
        packer.record.add(
            "transformer_blocks.*.norm1.linear, proj_out_1", "temporal table", "depends on t and label only"
        )

    def read(self, hidden_states=None, timestep=None, class_labels=None, *args, **kwargs) -> Call:
        """diffusers' forward(hidden_states, timestep, class_labels, ...) or the bundled forward(x, t, class_labels)."""
        self._structure.check()
        names = ("cross_attention_kwargs", "return_dict")
        kwargs |= dict(zip(names, args, strict=False))
        sample = kwargs.pop("x", hidden_states)
        time = rows_of_time(kwargs.pop("t", timestep), sample.shape[0])
        return_dict = kwargs.pop("return_dict", True)
        only_defaults(**kwargs)
        require(class_labels is not None, "class_labels are needed")
        return Call(sample, (time, class_labels), (), self._wrap(return_dict))

    def _wrap(self, return_dict: bool):
        if not _is_diffusers(self._module):
            return lambda out: out
        return (
            (lambda out: output_class(self._module, "Transformer2DModelOutput")(sample=out))
            if return_dict
            else lambda out: (out,)
        )

    def prepare(self, call: Call) -> None:
        batch = call.sample.shape[0]
        if self._positions is None or self._positions.shape[0] < batch:
            self._positions = self._pos.detach().float().expand(batch, -1, -1).contiguous()

    def encode(self) -> tuple[Tensor, ...]:
        return ()

    def body(self, sample: Tensor, rows: Tensor) -> Tensor:
        """`[B, C, H, W]` and the modulations `[B, (6 blocks + 2) hidden]` to `[B, C', H, W]` in the sample's dtype."""
        head = self.head(sample, rows)
        return self.tail(self.middle(head, rows), head, sample, rows)

    def head(self, sample: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """The tokens `[B, N, hidden]` after the first block."""
        return (self._run_block(0, self._embed(sample), rows),)

    def middle(self, head: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """All blocks but the first."""
        (x,) = head
        for i in range(1, len(self._blocks)):
            x = self._run_block(i, x, rows)
        return x

    def tail(self, x: Tensor, head: tuple[Tensor, ...], sample: Tensor, rows: Tensor) -> Tensor:
        """From the tokens to the prediction."""
        shift, scale = self._parts(rows, 6 * len(self._blocks), 2)
        x = ops.norm_modulate(x, "layer", None, None, self._final_eps, shift, scale, self._mode.stream)
        return self._unpatchify(self._final(x, out_dtype=torch.float32), sample)

    def _parts(self, rows: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """Views of `count` modulations in the temporal rows."""
        return rows.unflatten(1, (6 * len(self._blocks) + 2, -1))[:, first : first + count].unbind(1)

    def _run_block(self, i: int, x: Tensor, rows: Tensor) -> Tensor:
        block = self._blocks[i]
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = self._parts(rows, 6 * i, 6)
        h, codes_scale = self._normed(block.qkv, x, block.norms_eps[0], shift_attn, scale_attn)
        q, k, v = block.qkv(h, x_scale=codes_scale).unflatten(2, (3, self._heads, -1)).unbind(2)
        h = ops.attention(q, k, v, None, None, q.shape[-1] ** -0.5, self._mode.attention)
        with spend(x):
            x = block.projection(h.flatten(2), gate=gate_attn, residual=x, out_dtype=torch.float32)
        h, codes_scale = self._normed(block.first, x, block.norms_eps[1], shift_ff, scale_ff)
        h = block.first(h, activation="gelu_tanh", x_scale=codes_scale)
        with spend(x):
            return block.second(h, gate=gate_ff, residual=x, out_dtype=torch.float32)

    def _normed(self, into: PackedLinear, x: Tensor, eps: float, shift: Tensor, scale: Tensor):
        """Norm and modulation, as codes and their scales where the next product wants codes."""
        if into.scale is not None:
            return ops.norm_modulate_int8(x, "layer", None, None, eps, shift, scale)
        return ops.norm_modulate(x, "layer", None, None, eps, shift, scale, self._mode.stream), None

    def _embed(self, sample: Tensor) -> Tensor:
        p = self._module.pos_embed.proj.kernel_size[0]
        B, _, H, W = sample.shape
        patches = (
            sample.unflatten(3, (W // p, p)).unflatten(2, (H // p, p)).permute(0, 2, 4, 1, 3, 5)
        )  # [B, h, w, C, p, p]
        tokens = ops.copy(patches, torch.float32).flatten(3).flatten(1, 2)
        return self._patch(tokens, residual=self._positions[:B], out_dtype=torch.float32)

    def _unpatchify(self, tokens: Tensor, sample: Tensor) -> Tensor:
        p = self._module.pos_embed.proj.kernel_size[0]
        h, w = sample.shape[2] // p, sample.shape[3] // p
        patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (h, w)).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
        return ops.copy(patches, sample.dtype).flatten(4, 5).flatten(2, 3)

    def _modulations(self, t: Tensor, labels: Tensor) -> Tensor:
        """Shift, scale and gate of both halves of every block, then shift and scale of the output, for R rows."""
        last = self._module.proj_out_1
        dtype = torch.float32 if is_coded(last) else last.weight.dtype
        if _is_diffusers(self._module):
            embed = lambda norm: norm.emb(t, labels, hidden_dtype=dtype)
        else:
            sinusoid = timestep_sinusoid(t, 256, flip_sin_to_cos=True, freq_shift=1).to(dtype)
            embed = lambda norm: norm.emb(sinusoid, labels)
        norms = [block.norm1 for block in self._module.transformer_blocks]
        parts = [norm.linear(F.silu(embed(norm))) for norm in norms]
        return torch.cat([*parts, self._module.proj_out_1(F.silu(embed(norms[0])))], dim=1)


def lower_dit(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredDiT:
    """Packs a DiT. Raises UnsupportedError where it differs from the published architecture."""
    for i, block in enumerate(module.transformer_blocks):
        name = f"transformer_blocks.{i}"
        require(getattr(block.norm1, "emb", None) is not None, f"{name}.norm1 has no embedder")
        processor = type(getattr(block.attn1, "processor", None)).__name__
        require(processor in _PROCESSORS | {"NoneType"}, f"{name}.attn1 has the processor {processor}")
        require(getattr(block.norm3, "weight", None) is None, f"{name}.norm3 has a weight")
        act = getattr(block.ff.net[0], "approximate", "tanh")
        require(act == "tanh", f"{name}.ff is not GELU in its tanh form")
    require(module.pos_embed.pos_embed is not None, "pos_embed has no table")
    return LoweredDiT(module, packer, exact_time)


def _block(packer: Packer, name: str, block: nn.Module) -> _Block:
    attn, ff = block.attn1, block.ff
    return _Block(
        packer.linear(f"{name}.attn1.qkv", attn.to_q, attn.to_k, attn.to_v),
        packer.linear(f"{name}.attn1.to_out.0", attn.to_out[0]),
        packer.linear(f"{name}.ff.net.0.proj", ff.net[0].proj),
        packer.linear(f"{name}.ff.net.2", ff.net[2]),
        (block.norm1.norm.eps, block.norm3.eps),
    )


def _is_diffusers(module: nn.Module) -> bool:
    return type(module).__name__ == "DiTTransformer2DModel"
