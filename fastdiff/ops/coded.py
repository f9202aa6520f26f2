"""Products with quantized weights: the one place that chooses kernels for a format. Made of ops and views, so that programs
can record them."""

import dataclasses
from dataclasses import dataclass

import torch

from fastdiff.ops import packing
from fastdiff.ops.activate import activate
from fastdiff.ops.conv2d import conv2d
from fastdiff.ops.conv2d_w8a8 import conv2d_w8a8
from fastdiff.ops.copy import copy
from fastdiff.ops.geglu import geglu
from fastdiff.ops.linear import linear
from fastdiff.ops.linear_call import PAIRS
from fastdiff.ops.linear_w4a8 import linear_w4a8
from fastdiff.ops.linear_w4a16 import linear_w4a16
from fastdiff.ops.linear_w8a8 import linear_w8a8
from fastdiff.ops.linear_w8a16 import linear_w8a16
from fastdiff.ops.memory import Shelf
from fastdiff.ops.quantize_static import quantize_static
from fastdiff.ops.scale_channels import scale_channels

Tensor = torch.Tensor
Range = tuple[Tensor, Tensor | None]  # scale and offset of static activations: [1] or one per sample


@dataclass(frozen=True, eq=False)
class Coded:
    """A quantized weight and what happens to the input of its product.

    codes   [N, K] int8, [N, C, k, k] of a convolution: weight = codes * scale
    scale   [N, G] float32, of K / G consecutive inputs each; G > 1 has 4-bit codes, and is for linear layers
    dense   the same weight in float32 where its format has no such codes, else None
    bias    [N] float32 or None
    inputs  what becomes of activations: "float", "dynamic" (int8 by row; by sample in a convolution) or "static"
    offset  whether static ranges have an offset
    smooth  [K] float32, what inputs are multiplied with before anything else, or None
    hadamard  [g, g] float32, which every g inputs are multiplied with first, or None
    up, down  [N, r], [r, K] float32: a branch in floating point beside the product, or None
    """

    codes: Tensor | None
    scale: Tensor | None
    dense: Tensor | None
    bias: Tensor | None
    inputs: str
    offset: bool = False
    smooth: Tensor | None = None
    hadamard: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """The codes, or the weight where there are none."""
        return self.dense if self.codes is None else self.codes


def join(parts: list[Coded]) -> Coded:
    """Layers over the same input as one. Raises ValueError where they want it in different codes."""
    first = parts[0]
    same = lambda name: len({getattr(p, name) is None for p in parts}) == 1
    shapes = {(p.inputs, p.offset, 1 if p.scale is None else p.scale.shape[1]) for p in parts}
    rotations = {0 if p.hadamard is None else len(p.hadamard) for p in parts}
    smoothed = same("smooth") and all(first.smooth is None or torch.equal(p.smooth, first.smooth) for p in parts)
    if len(shapes) > 1 or len(rotations) > 1 or not (same("codes") and same("up") and smoothed):
        raise ValueError("layers over one input are quantized in different ways")
    rows = lambda name: None if getattr(first, name) is None else torch.cat([getattr(p, name) for p in parts])
    bias = [torch.zeros(p.outputs, device=p.weight.device) if p.bias is None else p.bias for p in parts]
    bias = None if all(p.bias is None for p in parts) else torch.cat(bias)
    up = None if first.up is None else torch.block_diag(*(p.up for p in parts))
    joined = {name: rows(name) for name in ("codes", "scale", "dense", "down")}
    return dataclasses.replace(first, **joined, up=up, bias=bias)


def take(coded: Coded, inputs: slice) -> Coded:
    """What a linear layer does to some of its inputs; the last of them bring its bias.

    Raises ValueError where groups of inputs that share a scale or a rotation would be cut.
    """
    width = (coded.dense if coded.codes is None else coded.codes).shape[1]
    start, stop, _ = inputs.indices(width)
    groups = 1 if coded.scale is None else coded.scale.shape[1]
    shared = max(1 if groups == 1 else width // groups, 1 if coded.hadamard is None else len(coded.hadamard))
    if start % shared or stop % shared:
        raise ValueError(f"{shared} inputs share a scale or a rotation, which cannot be cut at {start} and {stop}")
    columns = lambda t: None if t is None else t[:, start:stop]
    scale = coded.scale if groups == 1 else coded.scale[:, start * groups // width : stop * groups // width]
    parts = {name: columns(getattr(coded, name)) for name in ("codes", "dense", "down")}
    smooth = None if coded.smooth is None else coded.smooth[start:stop].contiguous()
    bias = coded.bias if stop == width else None
    return dataclasses.replace(coded, **parts, scale=scale, smooth=smooth, bias=bias)


class CodedLinear:
    """A linear layer with a quantized weight, packed; everything that is not codes runs in `stream`, a float dtype.

    scale is None: it reads floats, as layers with floating-point weights do
    """

    scale = None

    def __init__(self, coded: Coded, stream: torch.dtype, pairs: bool = False) -> None:
        self.coded, self.stream, self.out_features = coded, stream, coded.outputs
        self._pairs = pairs
        side = None if coded.up is None else (_float(coded.down, stream), _float(coded.up, stream))
        self._side = side
        self._rotation = None if coded.hadamard is None else _float(coded.hadamard, stream)
        # the branch is added before the activation, so that an activation of pairs cannot be in the same kernel
        order = _interleaved if pairs and side is None else lambda t: t
        get = lambda t: None if t is None else order(t)
        self._bias = get(coded.bias)
        if coded.codes is None:
            self._weight, self._scales = _float(get(coded.dense), stream), None
            return
        codes, scale = get(coded.codes), get(coded.scale)
        self.group, self._tail = codes.shape[1] // scale.shape[1], 0
        if scale.shape[1] > 1:
            self._weight, self._scales = packing.pack_int4(codes), scale.contiguous()
            return
        if coded.offset:
            codes = with_tail(codes)
            self._tail = codes.shape[1] - coded.codes.shape[1]
        self._weight, self._scales, self._sums = (
            packing.pack(codes),
            scale[:, 0].contiguous(),
            packing.weight_sums(codes),
        )

    def move(self, shelf: Shelf) -> None:
        """Puts the packed weight on a shelf."""
        self._weight = shelf.keep(self._weight)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self._weight, self._scales, *(self._side or ())) if t is not None)

    def __call__(
        self,
        x: Tensor,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        x_range: Range | None = None,
    ) -> Tensor:
        """`[B, ..., K]` to `[B, ..., N]`: product, bias, activation, gate and residual, in `out_dtype` (the stream's).

        x_range  of static activations
        """
        out = out_dtype or self.stream
        if self.coded.smooth is not None:
            x = scale_channels(x, self.coded.smooth, self.stream)
        if self._side is None:
            return self._product(x, self._bias, activation, gate, residual, out, x_range)
        down, up = self._side
        h = linear(x, down, self.coded.down.shape[0], None, "none", None, None, self.stream)
        if activation == "none":  # gate * (product + branch) + residual
            residual = linear(h, up, self.out_features, self._bias, "none", gate, residual, torch.float32)
            return self._product(x, None, "none", gate, residual, out, x_range)
        residual_of = linear(h, up, self.out_features, self._bias, "none", None, None, torch.float32)
        y = self._product(x, None, "none", None, residual_of, torch.float32, x_range)
        if gate is not None or residual is not None:
            raise ValueError("CodedLinear: a low-rank branch, an activation and a gate or residual do not go together")
        return copy(geglu(y, activation) if activation in PAIRS else activate(y, activation), out)

    def _product(self, x, bias, activation, gate, residual, out, x_range) -> Tensor:
        n, rest = self.out_features, (bias, activation, gate, residual)
        if self._rotation is not None:
            g = len(self.coded.hadamard)
            x = linear(x.unflatten(-1, (-1, g)), self._rotation, g, None, "none", None, None, self.stream).flatten(-2)
        if self._scales is None:
            return linear(x, self._weight, n, *rest, out)
        if self._scales.dim() == 2:
            run = linear_w4a16 if self.coded.inputs == "float" else linear_w4a8
            return run(x, self._weight, self._scales, n, self.group, *rest, out)
        if self.coded.inputs == "float":
            return linear_w8a16(x, self._weight, self._scales, n, *rest, out)
        x_scale = None
        if self.coded.inputs == "static":
            x, x_scale = quantize_static(x, *x_range, self._tail), _by_row(x_range[0], x)
        return linear_w8a8(x, x_scale, self._weight, self._scales, self._sums, n, *rest, None, out)


class CodedConv:
    """A convolution with a square kernel and a quantized weight, packed, over channels-last images.

    channels  of the segments that the input comes in; static ranges hold for all of them
    padding   left, right, top, bottom;  upsample  as in ops.conv2d
    """

    def __init__(
        self,
        coded: Coded,
        stream: torch.dtype,
        channels: tuple[int, ...],
        stride: int,
        padding: list[int],
        upsample: int = 1,
    ) -> None:
        weight = coded.dense if coded.codes is None else coded.codes
        self.coded, self.stream, self.padding = coded, stream, padding
        self.out_channels, self._tails = coded.outputs, [0] * len(channels)
        self._shape = (self.out_channels, weight.shape[2], stride, padding, upsample)
        if coded.inputs == "float":
            values = weight if coded.codes is None else weight * coded.scale[:, 0].view(-1, 1, 1, 1)
            self._weight, self._scales = packing.pack_conv(values.to(stream), channels), None
            return
        parts = weight.split(list(channels), dim=1)
        if coded.offset:
            parts = [with_tail(part) for part in parts]
            self._tails = [part.shape[1] - count for part, count in zip(parts, channels, strict=True)]
        weight, counts = torch.cat(parts, 1), tuple(part.shape[1] for part in parts)
        self._weight, self._sums = packing.pack_conv(weight, counts), packing.conv_weight_sums(weight, counts)
        self._scales = coded.scale[:, 0].contiguous()

    def move(self, shelf: Shelf) -> None:
        """Puts the packed weight on a shelf."""
        self._weight = shelf.keep(self._weight)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def __call__(
        self,
        x: Tensor,
        second: Tensor | None = None,
        emb: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        x_range: Range | None = None,
    ) -> Tensor:
        """`[B, H, W, C1]`, and `[B, H, W, C2]` beside it, to `[B, Ho, Wo, N]` in `out_dtype` (the stream's)."""
        out, rest = out_dtype or self.stream, (self.coded.bias, emb, residual)
        if self._scales is None:
            return conv2d(x, second, self._weight, *self._shape, *rest, out)
        scale = None
        if self.coded.inputs == "static":
            scale = x_range[0]
            x = quantize_static(x, *x_range, self._tails[0])
            second = None if second is None else quantize_static(second, *x_range, self._tails[1])
        own = None if second is None else scale
        return conv2d_w8a8(
            x, scale, second, own, self._weight, self._scales, self._sums, *self._shape, *rest, None, out
        )


def with_tail(codes: Tensor) -> Tensor:
    """Codes followed by inputs whose codes add up to the sum of all: what `quantize_static`'s tail is multiplied with.

    codes  [N, K] or [N, C, k, k] int8; the sums are over dimension 1
    out    the same with r further inputs, the least number whose codes stay within -127..127
    """
    sums = codes.sum(1, dtype=torch.int32)
    count = max(1, -(-int(sums.abs().max()) // 127)) if sums.numel() else 1
    # shares that differ by at most one: floor((sum + i) / count) for i = 0 .. count - 1
    shares = [torch.div(sums + i, count, rounding_mode="floor") for i in range(count)]
    return torch.cat([codes, torch.stack(shares, 1).to(torch.int8)], 1)


def _by_row(scale: Tensor, x: Tensor) -> Tensor:
    """[1] as it is; one scale per sample as one per row of x."""
    if scale.numel() == 1 or x.dim() == 2:
        return scale
    over = scale.view(-1, *[1] * (x.dim() - 2))
    return copy(over.expand(x.shape[:-1]), torch.float32)


def _float(weight: Tensor, stream: torch.dtype) -> Tensor:
    return packing.pack(weight.to(torch.bfloat16 if stream != torch.float32 else stream))


def _interleaved(rows: Tensor) -> Tensor:
    half = rows.shape[0] // 2
    return packing.interleave(rows[:half], rows[half:])
