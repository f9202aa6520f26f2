"""Layers with packed weights: what a lowered model is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.adapters import merged
from fastdiff.models.lower.coded_layers import CodedPacker, StepRanges, is_coded
from fastdiff.models.lower.observed import Observed, Observer, WatchedConv, segment_names
from fastdiff.models.lower.record import Mode, Record, UnsupportedError
from fastdiff.ops.memory import Shelf
from fastdiff.ops.packing import conv_weight_sums, interleave, pack, pack_conv

Tensor = torch.Tensor
_FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "w8a8"}


@dataclass(frozen=True)
class PackedLinear:
    """One or several linear layers over the same input, as one matrix product with a fused epilogue."""

    weight: Tensor
    scale: Tensor | None
    sums: Tensor | None
    bias: Tensor | None
    out_features: int
    stream: torch.dtype

    def __call__(
        self,
        x: Tensor,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        x_scale: Tensor | None = None,
    ) -> Tensor:
        """`[..., K]` to `[..., N]`: product, bias, activation, gate and residual, in `out_dtype` (the stream's).

        x_scale  `[...]` of the rows, where x is int8 codes
        """
        n, out = self.out_features, out_dtype or self.stream
        if self.scale is None:
            return ops.linear(x, self.weight, n, self.bias, activation, gate, residual, out)
        return ops.linear_w8a8(
            x, x_scale, self.weight, self.scale, self.sums, n, self.bias, activation, gate, residual, None, out
        )


@dataclass(frozen=True)
class PackedConv:
    """A convolution over NHWC with everything around it that needs no reduction."""

    weight: Tensor
    scale: Tensor | None
    sums: Tensor | None
    bias: Tensor | None
    out_channels: int
    kernel: int
    stride: int
    padding: list[int]
    upsample: int
    stream: torch.dtype
    ranges: tuple[Callable[[int], Tensor], ...] = ()  # of static int8 segments: what gives their scales for a batch

    def __call__(
        self,
        x: Tensor,
        second: Tensor | None = None,
        emb: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """`[B, H, W, C1]`, and `[B, H, W, C2]` beside it, to `[B, Ho, Wo, N]` in `out_dtype` (the stream's)."""
        shape = (self.out_channels, self.kernel, self.stride, self.padding, self.upsample)
        rest = (self.bias, emb, residual)
        out = out_dtype or self.stream
        if self.scale is None:
            return ops.conv2d(x, second, self.weight, *shape, *rest, out)
        own, other = ([scale(x.shape[0]) for scale in self.ranges] + [None, None])[:2]
        return ops.conv2d_w8a8(x, own, second, other, self.weight, self.scale, self.sums, *shape, *rest, None, out)


class Packer:
    """Packs the layers of a module for a mode, and notes what it did.

    spared         layers to keep in floating point, from name to reason
    keep_original  False: gives up the weights of each layer as soon as it is packed
    dry            only look whether every layer can be packed
    observer       told what enters int8 convolutions, which then quantize each sample as it comes
    observed       ranges of what enters them; without, they quantize each sample as it comes
    """

    def __init__(
        self,
        mode: Mode,
        record: Record,
        spared: dict[str, str] | None = None,
        keep_original: bool = True,
        dry: bool = False,
        observer: Observer | None = None,
        observed: Observed | None = None,
    ) -> None:
        self.mode = mode
        self.record = record
        self._spared = spared or {}
        self._keep_original = keep_original or dry
        self._dry = dry
        self._observer, self._observed = observer, observed
        self.ranges = StepRanges()
        self.shelf = Shelf()
        self.coded = CodedPacker(mode, record, self.ranges, self.shelf)

    def linear(
        self, name: str, *linears: nn.Linear, pairs: bool = False, spare: str = "", precise: str = ""
    ) -> PackedLinear:
        """Linear layers that share an input, next to each other. A convolution over patches that don't overlap is one
        over patches `[C, p, p]` or `[C, 1, p, p]`, 1 x 1 included.

        pairs    the halves of the output are a value and its gate (GEGLU)
        spare    why the weights stay in floating point, in a mode that quantizes
        precise  why the weights are float32, in every mode
        """
        linears = tuple(merged(name, layer) for layer in linears)
        if any(map(is_coded, linears)):
            return self.coded.linear(name, *linears, pairs=pairs, once=bool(spare))
        for layer in linears:
            check_plain(name, layer, type(layer) if _is_patchwise(layer) else nn.Linear)
        weight = torch.cat([self._look(layer).float().flatten(1) for layer in linears])
        bias = _joined_bias(linears)
        if pairs:
            half = weight.shape[0] // 2
            if half % 16:
                raise UnsupportedError(f"{name} has {half} pairs, not a multiple of 16")
            weight = interleave(weight[:half], weight[half:])
            bias = None if bias is None else interleave(bias[:half], bias[half:])
        total = lambda codes: codes.sum(dim=1, dtype=torch.int32)
        packed, scale, sums = self._pack(weight, pack, self._format(name, spare, precise), total)
        self._note(name, packed, precise or spare)
        self.give_up(*linears)
        return PackedLinear(packed, scale, sums, bias, weight.shape[0], self.mode.stream)

    def conv(
        self,
        name: str,
        conv: nn.Conv2d,
        channels: tuple[int, ...] | None = None,
        padding: list[int] | None = None,
        upsample: int = 1,
        spare: str = "",
        precise: str = "",
    ) -> PackedConv:
        """A convolution with a square kernel.

        channels        of the two segments that its input comes in
        padding         left, right, top, bottom, where it differs from the layer's own
        spare, precise  as in `linear`
        """
        if is_coded(conv):
            return self.coded.conv(name, conv, channels, padding, upsample)
        conv = merged(name, conv)
        check_plain(name, conv, nn.Conv2d)
        flat = self._look(conv).float().flatten(1)
        form = self._format(name, spare, precise)
        shape, counts = conv.weight.shape, channels or (conv.in_channels,)
        arrange = lambda values: pack_conv(values.view(values.shape[0], *shape[1:]), counts)
        total = lambda codes: conv_weight_sums(codes.view(codes.shape[0], *shape[1:]), counts)
        packed, scale, sums = self._pack(flat, arrange, form, total)
        names = segment_names(name, len(counts)) if form == torch.int8 else ()
        ranges = self._static(names)
        self._note(name, packed, precise or spare, " static" if ranges else "")
        if padding is None:
            padding = [conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]]
        bias = None if conv.bias is None else conv.bias.detach().float()
        self.give_up(conv)
        geometry = (conv.out_channels, conv.kernel_size[0], conv.stride[0], padding, upsample)
        made = PackedConv(packed, scale, sums, bias, *geometry, self.mode.stream, ranges)
        return WatchedConv(made, names, self._observer) if names and self._observer else made

    def _static(self, names: tuple[str, ...]) -> tuple[Callable[[int], Tensor], ...]:
        """What gives the scales of segments, where all of them were observed."""
        known = {} if self._observed is None else self._observed.scales
        if not all(name in known for name in names):
            return ()
        return tuple(self.ranges.add_table(known[name], self._observed.times) for name in names)

    def _format(self, name: str, spare: str, precise: str) -> torch.dtype:
        if precise:
            return torch.float32
        quantized = self.mode.weights == torch.int8
        if quantized and (spare or name in self._spared):
            return self.mode.stream
        return self.mode.weights

    def _pack(
        self,
        weight: Tensor,
        arrange: Callable[[Tensor], Tensor],
        form: torch.dtype,
        total: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._dry:
            return weight[:0].to(form), None, None
        if form != torch.int8:
            return self.shelf.keep(arrange(weight.to(form))), None, None
        codes, scale = ops.quantize_rows(weight)  # 12 times torch's speed
        return self.shelf.keep(arrange(codes)), scale, total(codes)

    def _look(self, layer: nn.Module) -> Tensor:
        """A weight, or only what it looks like."""
        return layer.weight.detach().to("meta") if self._dry else layer.weight.detach()

    def give_up(self, *layers: nn.Module) -> None:
        """Frees the weights of packed layers, where the originals are not kept."""
        if not self._keep_original:
            for layer in (layer for layer in layers if not is_coded(layer)):
                layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)

    def _note(self, name: str, packed: Tensor, spare: str, how: str = "") -> None:
        reason = "" if packed.dtype == self.mode.weights else spare or self._spared.get(name, "")
        self.record.add(name, _FORMATS[packed.dtype] + how, reason, packed.nbytes)


def _is_patchwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that sees every pixel once."""
    if type(layer) not in (nn.Conv2d, nn.Conv3d):
        return False
    return layer.kernel_size == layer.stride and not any(layer.padding) and layer.groups == 1


def check_plain(name: str, layer: nn.Module, expected: type) -> None:
    """A subclass (LoRA), a parametrization or a hook computes something else than the plain layer."""
    if type(layer) is not expected:
        raise UnsupportedError(f"{name} is a {type(layer).__name__}, not a plain {expected.__name__}")
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        raise UnsupportedError(f"{name} has hooks")


def _joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(layer.bias is None for layer in linears):
        return None
    zeros = lambda layer: layer.weight.new_zeros(layer.weight.shape[0], dtype=torch.float32)
    return torch.cat([zeros(l) if l.bias is None else l.bias.detach().float() for l in linears])
