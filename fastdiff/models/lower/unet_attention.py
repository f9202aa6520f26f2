"""Attention in a UNet on fused kernels: over pixels, and as transformer blocks that also read a context."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.lowered import require
from fastdiff.models.lower.unet_blocks import Assembly, Conditions, Norm, as_float, is_missing, pack_norm
from fastdiff.ops.memory import spend

Tensor = torch.Tensor
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "NoneType")
_FAMILIES = ("Attention", "SpatialAttention")
_ONCE = "runs once for each context, not at each step"


@dataclass(frozen=True)
class Attend:
    """Attention with its projections and a residual around it.

    project  to queries, keys and values, or to queries only
    encoded  for cross-attention, which of the encoded keys and values it reads
    """

    project: PackedLinear
    out: PackedLinear
    heads: int
    precision: str
    encoded: int | None

    def __call__(self, h: Tensor, residual: Tensor, conditions: Conditions) -> Tensor:
        """`[B, N, C]` normed tokens and the tokens themselves to `[B, N, C]`."""
        split = lambda tensor, parts: tensor.unflatten(2, (parts, self.heads, -1)).unbind(2)
        if self.encoded is None:
            q, k, v = split(self.project(h), 3)
        else:
            (q,) = split(self.project(h), 1)
            k, v = split(conditions.encoded[self.encoded], 2)
        h = ops.attention(q, k, v, None, None, q.shape[-1] ** -0.5, self.precision)
        return self.out(h.flatten(2), residual=residual)


@dataclass(frozen=True)
class PixelAttention:
    """Self-attention over the pixels of a feature map."""

    norm: Norm | None
    attend: Attend

    def __call__(self, x: Tensor, conditions: Conditions) -> Tensor:
        h = x if self.norm is None else self.norm(x, None, "none")
        return self.attend(h.flatten(1, 2), x.flatten(1, 2), conditions).view(x.shape)


@dataclass(frozen=True)
class LayerNorm:
    """Norm of every token."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    stream: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return ops.norm_modulate(x, "layer", self.weight, self.bias, self.eps, None, None, self.stream)


@dataclass(frozen=True)
class TransformerBlock:
    """One or two attentions and a feed-forward layer with GEGLU, each on the norm of what it is added to. Tokens are
    written over.
    """

    attends: tuple[tuple[LayerNorm, Attend], ...]
    norm: LayerNorm
    first: PackedLinear
    second: PackedLinear

    def __call__(self, x: Tensor, conditions: Conditions) -> Tensor:
        for norm, attend in self.attends:
            with spend(x):
                x = attend(norm(x), x, conditions)
        with spend(x):
            return self.second(self.first(self.norm(x), activation="geglu"), residual=x)


@dataclass(frozen=True)
class SpatialTransformer:
    """Transformer blocks over the pixels of a feature map, which is added to their result."""

    norm: Norm
    enter: PackedLinear
    blocks: tuple[TransformerBlock, ...]
    leave: PackedLinear

    def __call__(self, x: Tensor, conditions: Conditions) -> Tensor:
        tokens = self.enter(self.norm(x, None, "none").flatten(1, 2))
        for block in self.blocks:
            tokens = block(tokens, conditions)
        return self.leave(tokens, residual=x.flatten(1, 2)).view(x.shape)


def pack_attention(
    assembly: Assembly, name: str, module: nn.Module | None
) -> PixelAttention | SpatialTransformer | None:
    """Packs what follows a residual block, if anything does."""
    if module is None:
        return None
    kind = type(module).__name__
    require(kind in (*_FAMILIES, "Transformer2DModel"), f"{name} is a {kind}")
    return (_pack_pixels if kind in _FAMILIES else _pack_transformer)(assembly, name, module)


def _pack_pixels(assembly: Assembly, name: str, attention: nn.Module) -> PixelAttention:
    norm = attention.group_norm
    require(getattr(attention, "residual_connection", True), f"{name} has no residual")
    return PixelAttention(
        None if norm is None else pack_norm(assembly.packer, f"{name}.group_norm", norm),
        _pack_attend(assembly, name, attention, cross=False),
    )


def _pack_transformer(assembly: Assembly, name: str, module: nn.Module) -> SpatialTransformer:
    packer = assembly.packer
    require(module.is_input_continuous, f"{name} does not read feature maps")
    norm = pack_norm(packer, f"{name}.norm", module.norm)
    enter = packer.linear(f"{name}.proj_in", module.proj_in)
    blocks = module.transformer_blocks
    packed = tuple(_pack_block(assembly, f"{name}.transformer_blocks.{i}", block) for i, block in enumerate(blocks))
    return SpatialTransformer(norm, enter, packed, packer.linear(f"{name}.proj_out", module.proj_out))


def _pack_block(assembly: Assembly, name: str, block: nn.Module) -> TransformerBlock:
    packer, feed = assembly.packer, block.ff.net
    require(type(block).__name__ == "BasicTransformerBlock", f"{name} is a {type(block).__name__}")
    require(block.norm_type == "layer_norm", f"{name} has norm_type {block.norm_type}")
    require(block.pos_embed is None and not block.double_self_attention, f"{name} is not a plain transformer block")
    require(type(feed[0]).__name__ == "GEGLU", f"{name}.ff is a {type(feed[0]).__name__}, not GEGLU")
    attends = [("norm1", "attn1", block.only_cross_attention), ("norm2", "attn2", True)]
    return TransformerBlock(
        tuple(
            (
                _pack_layer_norm(packer, f"{name}.{norm}", getattr(block, norm)),
                _pack_inner(assembly, f"{name}.{attn}", layer, cross),
            )
            for norm, attn, cross in attends
            if (layer := getattr(block, attn)) is not None
        ),
        _pack_layer_norm(packer, f"{name}.norm3", block.norm3),
        packer.linear(f"{name}.ff.net.0.proj", feed[0].proj, pairs=True),
        packer.linear(f"{name}.ff.net.2", feed[2]),
    )


def _pack_inner(assembly: Assembly, name: str, attention: nn.Module, cross: bool) -> Attend:
    plain = attention.group_norm is None and not attention.residual_connection
    require(plain, f"{name} has a norm or a residual of its own")
    return _pack_attend(assembly, name, attention, cross)


def _pack_layer_norm(packer: Packer, name: str, norm: nn.LayerNorm) -> LayerNorm:
    require(type(norm) is nn.LayerNorm, f"{name} is a {type(norm).__name__}, not a plain LayerNorm")
    return LayerNorm(as_float(norm.weight), as_float(norm.bias), norm.eps, packer.mode.stream)


def _pack_attend(assembly: Assembly, name: str, attention: nn.Module, cross: bool) -> Attend:
    """Packs the projections of an attention layer."""
    packer = assembly.packer
    _check_attention(name, attention)
    q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
    if not cross:
        project, encoded = packer.linear(f"{name}.qkv", q, k, v), None
    else:
        project, encoded = packer.linear(f"{name}.to_q", q), len(assembly.cross)
        require(assembly.context_width in (0, k.in_features), f"{name} reads a context of another width")
        assembly.context_width = k.in_features
        assembly.cross.append(packer.linear(f"{name}.kv", k, v, spare=_ONCE))
    return Attend(project, packer.linear(f"{name}.to_out.0", out), attention.heads, packer.mode.attention, encoded)


def _check_attention(name: str, attention: nn.Module) -> None:
    processor = type(getattr(attention, "processor", None)).__name__
    require(processor in _PROCESSORS, f"{name} has the processor {processor}")
    for part in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim"):
        require(is_missing(attention, part), f"{name} has {part}")
    require(getattr(attention, "rescale_output_factor", 1.0) == 1.0, f"{name} scales its result")
    require(not getattr(attention, "fused_projections", False), f"{name} has fused projections")
    width = attention.to_q.out_features
    require(attention.to_k.out_features == attention.to_v.out_features == width, f"{name} shares keys among heads")
    scale = getattr(attention, "scale", None)
    usual = (width // attention.heads) ** -0.5
    require(scale is None or abs(scale / usual - 1) < 1e-6, f"{name} has the scale {scale}")
