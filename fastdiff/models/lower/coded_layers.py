"""Layers that are quantized already, packed for the fused forward: what `fastdiff.quantize` left in the module.

They are known by what they offer, not by their class: `coded()` is their weight for the kernels, `static_tables` the ranges
of static activations, and `steps` the times that ranges per step belong to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.record import Mode, Record, UnsupportedError
from fastdiff.ops.coded import Coded, CodedConv, CodedLinear, Range, join, take
from fastdiff.ops.memory import Shelf

Tensor = torch.Tensor


def is_coded(layer: nn.Module) -> bool:
    """Whether a layer is quantized, whole or in two parts."""
    return hasattr(layer, "coded") or hasattr(layer, "forward_parts")


class StepRanges:
    """Ranges of static activations of all layers for the calls in progress, in memory that programs read.

    Layers add their tables while they are packed; `fill` is called with the times of a call before its program runs.
    """

    def __init__(self) -> None:
        self._tables: list[Tensor] = []  # [S] each
        self._times: Tensor | None = None
        self._joined: Tensor | None = None  # [tables, S]
        self._filled: dict[int, Tensor] = {}  # batch -> [tables, batch]

    def add(self, layer: nn.Module) -> Callable[[int], Range]:
        """Takes the tables of a layer; returns what gives its range for a batch."""
        scale, offset = layer.static_tables
        if scale.numel() == 1:
            return lambda batch: (scale, offset)
        if layer.steps is None:
            raise UnsupportedError("ranges per step belong to no schedule")
        scales = self.add_table(scale, layer.steps.times)
        offsets = None if offset is None else self.add_table(offset, layer.steps.times)
        return lambda batch: (scales(batch), None if offsets is None else offsets(batch))

    def add_table(self, values: Tensor, times: Tensor) -> Callable[[int], Tensor]:
        """Takes values `[S]` for the model times `[S]`; returns what gives those of a batch, `[B]`."""
        self._times = times if self._times is None else self._times
        if not torch.equal(times, self._times):
            raise UnsupportedError("ranges per step belong to different schedules")
        index = len(self._tables)
        self._tables.append(values)
        return lambda batch: self._filled[batch][index]

    def fill(self, times: Tensor) -> None:
        """Looks the ranges of B samples up, from the times `[B]` that the network is called with."""
        if not self._tables:
            return
        if self._joined is None:
            self._joined = torch.stack(self._tables).to(times.device)
            self._times = self._times.to(times.device)
        values = self._joined.index_select(1, nearest_rows(times, self._times))
        kept = self._filled.setdefault(values.shape[1], values)
        if kept is not values:
            kept.copy_(values)


def follow_times(module: nn.Module) -> Callable[[Tensor], None] | None:
    """Tells the quantized layers of a module, which run in its temporal part, the times of the rows they compute."""
    contexts = list(
        {id(m.steps): m.steps for m in module.modules() if is_coded(m) and getattr(m, "steps", None)}.values()
    )
    if not contexts:
        return None

    def set_times(times: Tensor) -> None:
        for context in contexts:
            context.set(times)

    return set_times


def nearest_rows(times: Tensor, known: Tensor) -> Tensor:
    """Index of the nearest known time for every one of `times`, [B] int64."""
    return (times.detach().float().reshape(-1, 1) - known).abs().argmin(1)


class CodedPart:
    """A quantized linear layer over some of its inputs."""

    def __init__(self, layer: nn.Module, inputs: slice) -> None:
        self._layer, self._inputs = layer, inputs
        self.scheme, self.steps = layer.scheme, getattr(layer, "steps", None)

    def coded(self) -> Coded:
        """As the layer's own; raises ValueError where its groups would be cut."""
        return take(self._layer.coded(), self._inputs)

    @property
    def static_tables(self) -> tuple[Tensor, Tensor | None]:
        return self._layer.static_tables


@dataclass(frozen=True)
class FusedLinear:
    """A quantized linear layer in the place of a PackedLinear."""

    product: CodedLinear
    x_range: Callable[[int], Range] | None
    scale: None = None  # norms before it write floats

    @property
    def out_features(self) -> int:
        return self.product.out_features

    @property
    def stream(self) -> torch.dtype:
        return self.product.stream

    def __call__(
        self,
        x: Tensor,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        x_scale: Tensor | None = None,
    ) -> Tensor:
        """As PackedLinear does; x_scale is None, as x is never codes."""
        ranged = None if self.x_range is None else self.x_range(x.shape[0])
        return self.product(x, activation, gate, residual, out_dtype, ranged)


@dataclass(frozen=True)
class FusedConv:
    """A quantized convolution in the place of a PackedConv; one of 1 x 1 also takes tokens `[B, N, C]`."""

    product: CodedConv
    x_range: Callable[[int], Range] | None

    @property
    def padding(self) -> list[int]:
        return self.product.padding

    def __call__(
        self,
        x: Tensor,
        second: Tensor | None = None,
        emb: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As PackedConv does."""
        ranged = None if self.x_range is None else self.x_range(x.shape[0])
        if x.dim() == 4:
            return self.product(x, second, emb, residual, out_dtype, ranged)
        residual = None if residual is None else residual.unsqueeze(2)
        return self.product(x.unsqueeze(2), None, emb, residual, out_dtype, ranged).flatten(1, 2)


@dataclass(frozen=True)
class FusedSplit:
    """Two convolutions over the first `channels` channels and the rest, each with its own ranges."""

    first: FusedConv
    second: FusedConv
    channels: int

    def __call__(
        self,
        x: Tensor,
        second: Tensor | None = None,
        emb: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The parts come as two segments, or next to each other in x."""
        if second is None:
            x, second = (ops.copy(part, x.dtype) for part in (x[..., : self.channels], x[..., self.channels :]))
        y = self.first(x, emb=emb, residual=residual, out_dtype=torch.float32)
        return self.second(second, residual=y, out_dtype=out_dtype)


@dataclass(frozen=True)
class FusedUpsample:
    """Nearest upsampling by two inside a quantized convolution."""

    up: FusedConv
    whole: FusedConv

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """`[B, H, W, C]` to `[B, *size, N]`; the size is twice that of x, or one less."""
        if size == (2 * x.shape[1], 2 * x.shape[2]):
            return self.up(x)
        repeated = ops.resample(x, "nearest2x")[:, : size[0], : size[1]]
        return self.whole(ops.copy(repeated, x.dtype))


class CodedPacker:
    """Packs quantized layers for a mode, and notes what they run as."""

    def __init__(self, mode: Mode, record: Record, ranges: StepRanges, shelf: Shelf) -> None:
        self._mode, self._record, self._ranges, self._shelf = mode, record, ranges, shelf

    def linear(
        self, name: str, *layers: nn.Module, pairs: bool = False, once: bool = False
    ) -> FusedLinear | FusedConv:
        """Layers over the same input, next to each other; `once`: it runs once for many steps."""
        if hasattr(layers[0], "kernel_size"):
            return self.conv(name, layers[0])
        if not all(hasattr(layer, "coded") for layer in layers):
            raise UnsupportedError(f"{name}: some layers over its input are quantized, others are not")
        try:
            coded = join([layer.coded() for layer in layers])
        except ValueError as error:
            raise UnsupportedError(f"{name}: {error}") from None
        if pairs and coded.outputs % 32:
            raise UnsupportedError(f"{name} has {coded.outputs // 2} pairs, not a multiple of 16")
        product = CodedLinear(coded, self._mode.stream, pairs)
        product.move(self._shelf)
        self._note(name, layers[0], product.nbytes)
        return FusedLinear(product, self._range(name, coded, layers, once))

    def conv(
        self,
        name: str,
        conv: nn.Module,
        channels: tuple[int, ...] | None = None,
        padding: list[int] | None = None,
        upsample: int = 1,
    ) -> FusedConv | FusedSplit:
        """A convolution, or one in two parts."""
        if hasattr(conv, "forward_parts"):
            return self._split(name, conv, channels, padding, upsample)
        try:
            coded = conv.coded()
        except ValueError as error:
            raise UnsupportedError(f"{name}: {error}") from None
        segments = channels or (conv.in_channels,)
        padding = [conv.padding[0]] * 4 if padding is None else padding
        product = CodedConv(coded, self._mode.stream, segments, conv.stride[0], padding, upsample)
        product.move(self._shelf)
        self._note(name, conv, product.nbytes)
        return FusedConv(product, self._range(name, coded, (conv,), False))

    def _split(self, name: str, conv: nn.Module, channels: tuple[int, ...] | None, padding, upsample) -> FusedSplit:
        if conv.dim != 1 or (channels is not None and channels[0] != conv.channels):
            raise UnsupportedError(f"{name} is cut elsewhere than its input")
        parts = (("first", conv.first), ("second", conv.second))
        packed = [self.conv(f"{name}.{part}", layer, None, padding, upsample) for part, layer in parts]
        return FusedSplit(*packed, conv.channels)

    def _range(self, name: str, coded: Coded, layers: tuple, once: bool) -> Callable[[int], Range] | None:
        if coded.inputs != "static":
            return None
        if once and layers[0].static_tables[0].numel() > 1:
            raise UnsupportedError(f"{name} has ranges per step, but is computed once for all steps")
        for other in layers[1:]:
            pairs = zip(layers[0].static_tables, other.static_tables, strict=True)
            if not all(a is b is None or torch.equal(a, b) for a, b in pairs):
                raise UnsupportedError(f"{name}: layers over one input have different ranges")
        return self._ranges.add(layers[0])

    def _note(self, name: str, layer: nn.Module, nbytes: int) -> None:
        scheme = layer.scheme
        bits = 16 if scheme.input is None else scheme.input.bits
        self._record.add(name, f"quantized w{scheme.weight.bits}a{bits}", "", nbytes)
