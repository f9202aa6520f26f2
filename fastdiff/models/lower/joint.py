"""Blocks in which two streams of tokens attend to each other (Esser et al. 2024): Stable Diffusion 3, FLUX and their kin."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.attention_checks import check_attention
from fastdiff.models.lower.heads import (
    Columns,
    FeedForward,
    HeadNorm,
    Modulations,
    Rotation,
    TokenNorm,
    join,
    pack_feed_forward,
    pack_head_norm,
    pack_norm,
    turn,
)
from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.trunk import LAST
from fastdiff.ops.memory import spend

Tensor = torch.Tensor
Norms = tuple[HeadNorm | None, HeadNorm | None]
PROCESSORS = {"JointAttnProcessor2_0", "FluxAttnProcessor"}


@dataclass(frozen=True)
class Stream:
    """What one of the two streams has of its own in a block.

    columns   its modulations: shift, scale and gate of attention, then of the feed-forward layer, or scale and shift only
    qkv       queries, keys and values, or only the latter two where the stream ends with this block
    norms     of queries and keys
    out       the rest is None where the stream ends
    """

    columns: Columns
    norm: TokenNorm
    qkv: PackedLinear
    norms: Norms
    out: PackedLinear | None
    norm_feed: TokenNorm | None
    feed: FeedForward | None

    def project(self, x: Tensor, rows: Tensor, dim: int) -> Tensor:
        """`[B, N, C]` tokens to heads `[B, N, 3 H, D]`: queries, keys, values."""
        parts = self.columns.of(rows)
        scale, shift = parts if self.out is None else (parts[1], parts[0])
        h, h_scale = self.norm(x, self.qkv, shift, scale)
        return self.qkv(h, x_scale=h_scale).unflatten(2, (-1, dim))

    def attended(self, x: Tensor, h: Tensor, rows: Tensor) -> Tensor:
        """Adds what attention `[B, N, H, D]` found to the tokens."""
        return self.out(h.flatten(2), gate=self.columns.of(rows)[2], residual=x, out_dtype=torch.float32)

    def fed(self, x: Tensor, rows: Tensor) -> Tensor:
        """Adds the feed-forward layer to the tokens, which it may write over."""
        shift, scale, gate = self.columns.of(rows)[3:6]
        with spend(x):
            return self.feed(*self.norm_feed(x, self.feed.first, shift, scale), gate, x)


@dataclass(frozen=True)
class OwnAttention:
    """Attention of a stream to itself, beside the joint one (SD3.5-medium); its modulations are the last of the stream's."""

    norm: TokenNorm
    qkv: PackedLinear
    norms: Norms
    out: PackedLinear

    def __call__(self, x: Tensor, parts: list[Tensor], residual: Tensor, dim: int, precision: str) -> Tensor:
        shift, scale, gate = parts
        h, h_scale = self.norm(x, self.qkv, shift, scale)
        q, k, v = self.qkv(h, x_scale=h_scale).unflatten(2, (-1, dim)).chunk(3, dim=2)
        q, k = (turn(t, norm, None) for t, norm in zip((q, k), self.norms, strict=True))
        h = ops.attention(q, k, v, None, None, dim**-0.5, precision)
        return self.out(h.flatten(2), gate=gate, residual=residual, out_dtype=torch.float32)


@dataclass(frozen=True)
class JointBlock:
    """Both streams attend to the keys and values of both. Only these are put together: each stream's queries stay apart."""

    text: Stream
    image: Stream
    own: OwnAttention | None
    heads: int
    dim: int
    precision: str

    def __call__(
        self, text: Tensor, image: Tensor, rows: Tensor, rotation: Rotation | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """`[B, M, C]` and `[B, N, C]` float32 tokens to the same; None for a stream that ends. Text comes first in rotation."""
        streams = (self.text, self.image)
        heads = [stream.project(x, rows, self.dim) for stream, x in zip(streams, (text, image), strict=True)]
        k, v = self._keys_and_values(heads, rotation)
        before, parts = image, [slice(0, text.shape[1]), slice(text.shape[1], None)]
        found = [self._attend(*args, rotation, k, v) for args in zip(streams, heads, parts, strict=True)]
        image = self.image.attended(image, found[1], rows)
        if self.own is not None:
            image = self.own(before, self.image.columns.of(rows)[6:], image, self.dim, self.precision)
        image = self.image.fed(image, rows)
        text = None if found[0] is None else self.text.fed(self.text.attended(text, found[0], rows), rows)
        return text, image

    def _attend(
        self, stream: Stream, heads: Tensor, tokens: slice, rotation: Rotation | None, k: Tensor, v: Tensor
    ) -> Tensor | None:
        if stream.out is None:
            return None
        q = turn(heads[:, :, : self.heads], stream.norms[0], rotation and rotation[tokens])
        return ops.attention(q, k, v, None, None, self.dim**-0.5, self.precision)

    def _keys_and_values(self, heads: list[Tensor], rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        both = tuple(h[:, :, -2 * self.heads :] for h in heads)
        norms = self.text.norms[1], self.image.norms[1]
        if rotation is None and norms == (None, None):
            return join(both).chunk(2, dim=2)
        keys, values = zip(*(h.chunk(2, dim=2) for h in both), strict=True)
        return join(keys, norms, rotation), join(values)


@dataclass(frozen=True)
class Prediction:
    """The last norm, modulated, and the last layer."""

    columns: Columns
    norm: TokenNorm
    linear: PackedLinear

    def __call__(self, x: Tensor, rows: Tensor, out_dtype: torch.dtype) -> Tensor:
        """`[B, N, C]` tokens to `[B, N, outputs]`."""
        scale, shift = self.columns.of(rows)
        return self.linear(self.norm.modulate(x, shift, scale, torch.float32), out_dtype=out_dtype)


def pack_prediction(packer: Packer, module: nn.Module, modulations: Modulations) -> Prediction:
    """Packs the end of a model."""
    return Prediction(
        modulations.add_linear(module.norm_out, module.inner_dim),
        pack_norm("norm_out", module.norm_out.norm),
        packer.linear("proj_out", module.proj_out, precise=LAST),
    )


def pack_joint_block(packer: Packer, name: str, block: nn.Module, modulations: Modulations) -> JointBlock:
    """Packs a block of either family: they name their layers alike."""
    attn = block.attn
    heads, dim = attn.heads, attn.to_q.out_features // attn.heads
    check_attention(f"{name}.attn", attn, PROCESSORS, joint=True)
    norms = pack_head_norms(f"{name}.attn", attn, dim)
    image = Stream(
        modulations.add_linear(block.norm1, attn.to_q.in_features),
        pack_norm(f"{name}.norm1", block.norm1.norm),
        packer.linear(f"{name}.attn.qkv", attn.to_q, attn.to_k, attn.to_v),
        norms,
        packer.linear(f"{name}.attn.to_out.0", attn.to_out[0]),
        pack_norm(f"{name}.norm2", block.norm2),
        pack_feed_forward(packer, f"{name}.ff", block.ff),
    )
    text = _pack_text(packer, name, block, modulations)
    own = _pack_own(packer, name, block) if getattr(block, "attn2", None) is not None else None
    return JointBlock(text, image, own, heads, dim, packer.mode.attention)


def _pack_text(packer: Packer, name: str, block: nn.Module, modulations: Modulations) -> Stream:
    attn, norm = block.attn, block.norm1_context
    ends = getattr(block, "context_pre_only", False)
    layers = ([] if ends else [attn.add_q_proj]) + [attn.add_k_proj, attn.add_v_proj]
    dim = attn.to_q.out_features // attn.heads
    if ends:  # nothing reads what its queries would find
        packer.give_up(attn.add_q_proj)
    return Stream(
        modulations.add_linear(norm, attn.add_k_proj.in_features),
        pack_norm(f"{name}.norm1_context", norm.norm),
        packer.linear(f"{name}.attn.{'' if ends else 'q'}kv_context", *layers),
        pack_head_norms(f"{name}.attn", attn, dim, "norm_added_"),
        None if ends else packer.linear(f"{name}.attn.to_add_out", attn.to_add_out),
        None if ends else pack_norm(f"{name}.norm2_context", block.norm2_context),
        None if ends else pack_feed_forward(packer, f"{name}.ff_context", block.ff_context),
    )


def _pack_own(packer: Packer, name: str, block: nn.Module) -> OwnAttention:
    attn = block.attn2
    check_attention(f"{name}.attn2", attn, PROCESSORS)
    return OwnAttention(
        pack_norm(f"{name}.norm1", block.norm1.norm),
        packer.linear(f"{name}.attn2.qkv", attn.to_q, attn.to_k, attn.to_v),
        pack_head_norms(f"{name}.attn2", attn, attn.to_q.out_features // attn.heads),
        packer.linear(f"{name}.attn2.to_out.0", attn.to_out[0]),
    )


def pack_head_norms(name: str, attention: nn.Module, dim: int, prefix: str = "norm_") -> Norms:
    """Reads the norms of queries and keys with heads of `dim` elements."""
    parts = (prefix + "q", prefix + "k")
    return tuple(pack_head_norm(f"{name}.{part}", getattr(attention, part), dim) for part in parts)
