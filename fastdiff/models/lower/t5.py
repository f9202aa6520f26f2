"""Text encoders of the T5 family (Raffel et al. 2020): transformers' `T5EncoderModel` and `UMT5EncoderModel`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.context import FLOATS
from fastdiff.models.lower.heads import FeedForward, TokenNorm
from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.lowered import Call, only_defaults, output_class, require
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.unet_blocks import as_float
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor
_OUTLIERS = "its input has outliers: transformers keeps it in float32, too"
_NORMS = ("T5LayerNorm", "UMT5LayerNorm", "FusedRMSNorm")
_FEEDS = ("T5DenseGatedActDense", "UMT5DenseGatedActDense")
_ACTIVATIONS = {"NewGELUActivation": "geglu_tanh", "GELUTanh": "geglu_tanh", "GELUActivation": "geglu"}
_MOST_BIAS = 1 << 30  # bytes of position biases for one length


@dataclass(frozen=True)
class _Block:
    norm: TokenNorm
    qkv: PackedLinear
    out: PackedLinear
    norm_feed: TokenNorm
    feed: FeedForward

    def __call__(self, x: Tensor, bias: Tensor, lengths: Tensor | None, heads: int, precision: str) -> Tensor:
        h, h_scale = self.norm(x, self.qkv)
        q, k, v = self.qkv(h, x_scale=h_scale).unflatten(2, (3, heads, -1)).unbind(2)
        h = ops.attention(q, k, v, bias, lengths, 1.0, precision)
        x = self.out(h.flatten(2), residual=x, out_dtype=torch.float32)
        return self.feed(*self.norm_feed(x, self.feed.first), None, x)


class LoweredT5:
    """The encoder of a T5 in packed weights, from embedded tokens on.

    Its scores take a bias that depends on the distance of two tokens; T5 has one for all layers, UMT5 one for each.
    """

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module, self._stack = module, module.encoder
        self._mode = packer.mode
        self._structure = Structure(module)
        blocks = enumerate(self._stack.block)
        self._blocks = [_pack_block(packer, f"encoder.block.{i}", block) for i, block in blocks]
        self._norm = _read_norm("encoder.final_layer_norm", self._stack.final_layer_norm)
        self._attentions = [block.layer[0].SelfAttention for block in self._stack.block]
        self._biases: tuple[int, list[Tensor]] = (0, [])
        self.temporal = TemporalTable(lambda t: t.new_empty(len(t), 0))  # it knows no time

    def read(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **others: object,
    ) -> Call:
        """The arguments of transformers' forward; texts may be padded at their end."""
        self._structure.check()
        only_defaults(**{name: value for name, value in others.items() if value is not False})
        require((input_ids is None) != (inputs_embeds is None), "input_ids or inputs_embeds are needed")
        x = inputs_embeds
        if x is None:
            with torch.no_grad():
                x = self._stack.embed_tokens(input_ids)
        require(x.dim() == 3 and x.dtype in FLOATS, f"embedded tokens are {x.dtype} {list(x.shape)}")
        tokens = x.shape[1]
        size = tokens**2 * self._attentions[0].n_heads * len(self._own_biases()) * self._mode.stream.itemsize
        require(size <= _MOST_BIAS, f"position biases of {tokens} tokens take more than {_MOST_BIAS >> 20} MB")
        lengths = () if attention_mask is None else (_lengths(attention_mask, x.shape[:2]),)
        return Call(x, (x.new_zeros(x.shape[0], dtype=torch.float32),), lengths, self._wrap(return_dict))

    def _wrap(self, return_dict: bool | None) -> Callable[[Tensor], object]:
        if return_dict is None:
            return_dict = getattr(self._module.config, "return_dict", True)
        if not return_dict:
            return lambda out: (out,)
        output = output_class(self._stack, "BaseModelOutputWithPastAndCrossAttentions")
        return lambda out: output(last_hidden_state=out)

    def prepare(self, call: Call) -> None:
        """Makes the position biases `[1, H, M, M]`."""
        tokens = call.sample.shape[1]
        if self._biases[0] != tokens:
            biases = [layer.compute_bias(tokens, tokens) for layer in self._own_biases()]
            self._biases = tokens, [b.detach().to(self._mode.stream).contiguous() for b in biases]

    def _own_biases(self) -> list[nn.Module]:
        return [layer for layer in self._attentions if layer.has_relative_attention_bias]

    def encode(self, *lengths: Tensor) -> tuple[Tensor, ...]:
        """Nothing is computed of the lengths."""
        return lengths

    def body(self, sample: Tensor, rows: Tensor, *lengths: Tensor) -> Tensor:
        """`[B, M, C]` embedded tokens and how many of each text count `[B]` to encoded tokens in the sample's dtype."""
        x, biases = ops.copy(sample, torch.float32), iter(self._biases[1])
        for layer, block in zip(self._attentions, self._blocks, strict=True):
            bias = next(biases) if layer.has_relative_attention_bias else bias  # noqa: F821 - the first layer has one
            x = block(x, bias, lengths[0] if lengths else None, layer.n_heads, self._mode.attention)
        return self._norm.modulate(x, None, None, sample.dtype)


def _lengths(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """How many tokens of each text count, from a mask `[B, M]` that is 1 for those."""
    require(isinstance(mask, Tensor) and mask.shape == shape, f"attention_mask: a tensor {list(shape)} is needed")
    counts = mask != 0
    lengths = counts.sum(1, dtype=torch.int32)
    first = torch.arange(shape[1], device=lengths.device) < lengths[:, None]
    ends = torch.equal(counts, first) and bool((lengths > 0).all())
    require(ends, "attention_mask leaves out more than the end of a text")
    return lengths


def lower_t5(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredT5:
    """Packs the encoder of a T5. Raises UnsupportedError where it has no gated feed-forward layers."""
    for i, block in enumerate(module.encoder.block):
        name, feed = f"encoder.block.{i}.layer.1.DenseReluDense", block.layer[1].DenseReluDense
        require(type(feed).__name__ in _FEEDS, f"{name} is a {type(feed).__name__}")
        act = type(feed.act).__name__
        require(act in _ACTIVATIONS, f"{name} has the activation {act}")
    require(module.encoder.block[0].layer[0].SelfAttention.has_relative_attention_bias, "the first layer has no bias")
    return LoweredT5(module, packer, exact_time)


def _pack_block(packer: Packer, name: str, block: nn.Module) -> _Block:
    (attend, attention), (feed, dense) = (
        (layer, getattr(layer, part))
        for layer, part in zip(block.layer, ("SelfAttention", "DenseReluDense"), strict=True)
    )
    attending, feeding = f"{name}.layer.0.SelfAttention", f"{name}.layer.1.DenseReluDense"
    qkv = packer.linear(f"{attending}.qkv", attention.q, attention.k, attention.v)
    out = packer.linear(f"{attending}.o", attention.o)
    first = packer.linear(f"{feeding}.wi", dense.wi_1, dense.wi_0, pairs=True)
    second = packer.linear(f"{feeding}.wo", dense.wo, spare=_OUTLIERS)
    activation = _ACTIVATIONS[type(dense.act).__name__]
    norms = [_read_norm(f"{name}.layer.{i}.layer_norm", layer.layer_norm) for i, layer in enumerate((attend, feed))]
    return _Block(norms[0], qkv, out, norms[1], FeedForward(first, second, activation))


def _read_norm(name: str, norm: nn.Module) -> TokenNorm:
    require(type(norm).__name__ in _NORMS, f"{name} is a {type(norm).__name__}")
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return TokenNorm("rms", as_float(norm.weight), None, eps)
