"""Transformer blocks over tokens that look at each other, then at a context: PixArt, Wan, LTX-Video and their kin."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.context import ONCE
from fastdiff.models.lower.heads import TokenNorm, pack_norm
from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.lowered import require
from fastdiff.ops.memory import spend

Tensor = torch.Tensor


@dataclass(frozen=True)
class Surroundings:
    """What all blocks of one forward take besides their tokens.

    grid      how the tokens lie: height and width, or what else a family has
    mask      `[B, 1, M]`, added to the scores of the context, or None
    rotation  cosines and sines of queries and keys, `[N, D]` or, where heads turn differently, `[B, N, C]`, or None
    """

    grid: tuple[int, ...]
    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class SelfAttention:
    """Attention among tokens; queries and keys may be normed across all heads, and rotated."""

    qkv: PackedLinear
    norms: tuple[TokenNorm | None, TokenNorm | None]
    out: PackedLinear
    heads: int
    precision: str

    def __call__(self, h: Tensor, h_scale: Tensor | None, gate: Tensor, x: Tensor, around: Surroundings) -> Tensor:
        q, k, v = self.qkv(h, x_scale=h_scale).chunk(3, dim=2)
        q, k = (t if norm is None else norm.plain(t) for t, norm in zip((q, k), self.norms, strict=True))
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, v))
        if around.rotation is not None:
            q, k = (_rotated(t, *around.rotation) for t in (q, k))
        return self.out(self.mix(q, k, v).flatten(2), gate=gate, residual=x, out_dtype=torch.float32)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, N, H, D]` queries, keys and values to what each query sees."""
        return ops.attention(q, k, v, None, None, q.shape[-1] ** -0.5, self.precision)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of neighbours of `[B, N, H, D]`."""
    shape = x.shape
    if cos.shape[-1] != shape[3]:  # every head has its own angles: each is a token of its own
        x = x.view(shape[0], -1, 1, shape[3])
        cos, sin = (t.view(shape[0], -1, shape[3]) for t in (cos, sin))
    return ops.qk_norm_rope(x, None, None, cos, sin, True, x.dtype).view(shape)


@dataclass(frozen=True)
class CrossAttention:
    """Attention of tokens to a context whose keys and values are computed once."""

    norm: TokenNorm | None
    q: PackedLinear
    kv: PackedLinear
    norms: tuple[TokenNorm | None, TokenNorm | None]
    out: PackedLinear
    heads: int
    precision: str

    def encode(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, M, C]`."""
        k, v = self.kv(context).chunk(2, dim=2)
        return k if self.norms[1] is None else self.norms[1].plain(k), v

    def __call__(self, x: Tensor, k: Tensor, v: Tensor, around: Surroundings) -> Tensor:
        h, h_scale = (x, None) if self.norm is None else self.norm(x, self.q)
        q = self.q(h, x_scale=h_scale)
        q = q if self.norms[0] is None else self.norms[0].plain(q)
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in (q, k, v))
        mask = None if around.mask is None else around.mask[:, None]
        h = ops.attention(q, k, v, mask, None, q.shape[-1] ** -0.5, self.precision)
        return self.out(h.flatten(2), residual=x, out_dtype=torch.float32)


class Feed(Protocol):
    """What follows attention. `first` is the product that it starts with."""

    first: PackedLinear

    def __call__(self, h: Tensor, h_scale: Tensor | None, gate: Tensor, x: Tensor, around: Surroundings) -> Tensor: ...


@dataclass(frozen=True)
class ContextBlock:
    """Attention among tokens, attention to the context, and what follows, each added to the tokens in float32."""

    norms: tuple[TokenNorm, TokenNorm]
    attend: SelfAttention
    cross: CrossAttention
    feed: Feed

    def __call__(self, x: Tensor, six: list[Tensor], k: Tensor, v: Tensor, around: Surroundings) -> Tensor:
        """`[B, N, C]` tokens, and shift, scale and gate `[B, C]` of attention, then of what follows."""
        shift, scale, gate, shift_feed, scale_feed, gate_feed = six
        x = self.attend(*self.norms[0](x, self.attend.qkv, shift, scale), gate, x, around)
        with spend(x):
            x = self.cross(x, k, v, around)
        with spend(x):
            return self.feed(*self.norms[1](x, self.feed.first, shift_feed, scale_feed), gate_feed, x, around)


def pack_self(
    packer: Packer, name: str, attention: nn.Module, kind: type[SelfAttention] = SelfAttention
) -> SelfAttention:
    """Packs attention among tokens."""
    qkv = packer.linear(f"{name}.qkv", attention.to_q, attention.to_k, attention.to_v)
    out = packer.linear(f"{name}.to_out.0", attention.to_out[0])
    return kind(qkv, _pack_norms(name, attention), out, attention.heads, packer.mode.attention)


def pack_cross(packer: Packer, name: str, attention: nn.Module, norm: TokenNorm | None) -> CrossAttention:
    """Packs attention to a context; `norm` stands before its queries."""
    q = packer.linear(f"{name}.to_q", attention.to_q)
    kv = packer.linear(f"{name}.kv", attention.to_k, attention.to_v, spare=ONCE)
    out = packer.linear(f"{name}.to_out.0", attention.to_out[0])
    norms = _pack_norms(name, attention)
    return CrossAttention(norm, q, kv, norms, out, attention.heads, packer.mode.attention)


def _pack_norms(name: str, attention: nn.Module) -> tuple[TokenNorm | None, TokenNorm | None]:
    width = attention.to_q.out_features
    same = attention.to_k.out_features == attention.to_v.out_features == width
    require(same, f"{name} shares keys among heads")
    norms = tuple(getattr(attention, part, None) for part in ("norm_q", "norm_k"))
    for norm in norms:
        weight = getattr(norm, "weight", None)
        require(weight is None or weight.shape == (width,), f"{name} norms every head by itself")
    return pack_norm(f"{name}.norm_q", norms[0]), pack_norm(f"{name}.norm_k", norms[1])
