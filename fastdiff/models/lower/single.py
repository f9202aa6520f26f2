"""Blocks of one stream whose attention and feed-forward layer run side by side (Dehghani et al. 2023), as in FLUX."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.attention_checks import check_attention
from fastdiff.models.lower.coded_layers import CodedPart, is_coded
from fastdiff.models.lower.heads import Columns, Modulations, Rotation, TokenNorm, pack_norm, turn
from fastdiff.models.lower.joint import PROCESSORS, Norms, pack_head_norms
from fastdiff.models.lower.layers import PackedLinear, Packer, check_plain
from fastdiff.models.lower.lowered import require
from fastdiff.ops.memory import spend

Tensor = torch.Tensor


@dataclass(frozen=True)
class SingleBlock:
    """Attention and a feed-forward layer side by side, on the same normed tokens; one projection of both, in two parts.

    Its parts have their own rows of codes in w8a8, and what they multiply need not lie together.
    """

    columns: Columns
    norm: TokenNorm
    qkv: PackedLinear
    norms: Norms
    feed: PackedLinear
    out_heads: PackedLinear
    out_feed: PackedLinear
    dim: int
    precision: str

    def __call__(self, x: Tensor, rows: Tensor, rotation: Rotation) -> Tensor:
        """`[B, N, C]` float32 tokens to the same."""
        shift, scale, gate = self.columns.of(rows)
        h, h_scale = self.norm(x, self.qkv, shift, scale)
        q, k, v = self.qkv(h, x_scale=h_scale).unflatten(2, (-1, self.dim)).chunk(3, dim=2)
        if (self.feed.scale is None) != (self.qkv.scale is None):
            h, h_scale = self.norm(x, self.feed, shift, scale)
        fed = self.feed(h, activation="gelu_tanh", x_scale=h_scale)
        q, k = (turn(t, norm, rotation) for t, norm in zip((q, k), self.norms, strict=True))
        h = ops.attention(q, k, v, None, None, self.dim**-0.5, self.precision)
        x = self.out_heads(h.flatten(2), gate=gate, residual=x, out_dtype=torch.float32)
        with spend(x):
            return self.out_feed(fed, gate=gate, residual=x, out_dtype=torch.float32)


def pack_single_block(packer: Packer, name: str, block: nn.Module, modulations: Modulations) -> SingleBlock:
    """Packs a block of FLUX."""
    attn, width = block.attn, block.attn.to_q.out_features
    check_attention(f"{name}.attn", attn, PROCESSORS)
    require(getattr(block.act_mlp, "approximate", None) == "tanh", f"{name}.act_mlp is not GELU in its tanh form")
    dim = width // attn.heads
    heads, feed = _split(f"{name}.proj_out", block.proj_out, width)
    packed = SingleBlock(
        modulations.add_linear(block.norm, attn.to_q.in_features),
        pack_norm(f"{name}.norm", block.norm.norm),
        packer.linear(f"{name}.attn.qkv", attn.to_q, attn.to_k, attn.to_v),
        pack_head_norms(f"{name}.attn", attn, dim),
        packer.linear(f"{name}.proj_mlp", block.proj_mlp),
        packer.linear(f"{name}.proj_out (heads)", heads),
        packer.linear(f"{name}.proj_out (mlp)", feed),
        dim,
        packer.mode.attention,
    )
    packer.give_up(block.proj_out)
    return packed


def _split(name: str, linear: nn.Module, width: int) -> tuple[nn.Module, nn.Module]:
    """Two layers whose sum a layer is: over the first `width` inputs, and over the others."""
    if is_coded(linear):
        return CodedPart(linear, slice(0, width)), CodedPart(linear, slice(width, None))
    check_plain(name, linear, nn.Linear)
    parts = nn.Linear(1, 1, bias=False, device="meta"), nn.Linear(1, 1, bias=False, device="meta")
    for part, weight in zip(parts, (linear.weight[:, :width], linear.weight[:, width:]), strict=True):
        part.weight = nn.Parameter(weight.detach(), requires_grad=False)
    parts[1].bias = linear.bias
    return parts
