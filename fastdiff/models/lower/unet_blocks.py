"""The blocks of a UNet on fused kernels, over channels-last feature maps `[B, H, W, C]`."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.coded_layers import is_coded
from fastdiff.models.lower.layers import PackedConv, PackedLinear, Packer
from fastdiff.models.lower.lowered import require

Tensor = torch.Tensor
_RESNETS = ("ResnetBlock2D", "ResBlock")


@dataclass(frozen=True)
class Conditions:
    """What the blocks of one forward take besides their feature map.

    rows     `[B, columns]` of the temporal table
    encoded  keys and values of every cross-attention, `[B, M, 2 width]`
    """

    rows: Tensor
    encoded: tuple[Tensor, ...]


class Assembly:
    """Packs blocks and collects what they need from outside.

    resnets  whose time projections make the columns of the temporal table, in order
    cross    projections to keys and values of every cross-attention, in order; all read a context of `context_width`
    """

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.resnets: list[nn.Module] = []
        self.cross: list[PackedLinear] = []
        self.context_width = 0
        self._columns = 0

    def time_columns(self, resnet: nn.Module) -> slice | None:
        """Where the temporal table holds the projection of a residual block; None for one that has none."""
        projection = getattr(resnet, "time_emb_proj", None)
        if projection is None:
            return None
        self.resnets.append(resnet)
        start, self._columns = self._columns, self._columns + projection.out_features
        return slice(start, self._columns)


@dataclass(frozen=True)
class Norm:
    """Group norm of one or two segments, with SiLU where asked for."""

    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    out_dtype: torch.dtype

    def __call__(
        self,
        x: Tensor,
        second: Tensor | None,
        activation: str,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        affine = (self.groups, self.weight, self.bias, self.eps)
        return ops.group_norm(x, second, *affine, activation, scale, shift, None, self.out_dtype)


@dataclass(frozen=True)
class ResBlock:
    """Norm, SiLU, conv, plus time, norm, SiLU, conv, plus the (projected) input, which may come in two segments."""

    norm1: Norm
    conv1: PackedConv
    time: slice | None
    modulated: bool
    norm2: Norm
    conv2: PackedConv
    shortcut: PackedConv | PackedLinear | None

    def __call__(self, x: Tensor, second: Tensor | None, conditions: Conditions) -> Tensor:
        time = None if self.time is None else conditions.rows[:, self.time]
        h = self.conv1(self.norm1(x, second, "silu"), emb=None if self.modulated else time)
        if self.modulated:
            width = time.shape[1] // 2
            h = self.norm2(h, None, "silu", time[:, :width], time[:, width:])
        else:
            h = self.norm2(h, None, "silu")
        if self.shortcut is None:
            return self.conv2(h, residual=x)
        residual = self.shortcut(x) if second is None else self.shortcut(x, second)
        return self.conv2(h, residual=residual)


def pack_norm(packer: Packer, name: str, norm: nn.GroupNorm, out_dtype: torch.dtype | None = None) -> Norm:
    """Packs a group norm, whose results are in `out_dtype` (the stream's)."""
    require(type(norm) is nn.GroupNorm, f"{name} is a {type(norm).__name__}, not a plain GroupNorm")
    out_dtype = out_dtype or packer.mode.stream
    return Norm(norm.num_groups, as_float(norm.weight), as_float(norm.bias), norm.eps, out_dtype)


def as_float(parameter: Tensor | None) -> Tensor | None:
    """A parameter of a norm in float32."""
    return None if parameter is None else parameter.detach().float()


def pack_resnet(assembly: Assembly, name: str, resnet: nn.Module, second: int = 0) -> ResBlock:
    """Packs a residual block; `second` is how many of its input channels come as a second segment."""
    packer = assembly.packer
    _check_resnet(name, resnet)
    inputs = resnet.norm1.num_channels
    segments = (inputs - second, second) if second else (inputs,)
    require(not second or resnet.conv_shortcut is not None, f"{name} adds a concatenation to its result")
    return ResBlock(
        pack_norm(packer, f"{name}.norm1", resnet.norm1),
        pack_conv(packer, f"{name}.conv1", resnet.conv1),
        assembly.time_columns(resnet),
        getattr(resnet, "time_embedding_norm", "default") == "scale_shift",
        pack_norm(packer, f"{name}.norm2", resnet.norm2),
        pack_conv(packer, f"{name}.conv2", resnet.conv2),
        _pack_shortcut(packer, f"{name}.conv_shortcut", resnet.conv_shortcut, segments),
    )


def _pack_shortcut(
    packer: Packer, name: str, conv: nn.Conv2d | None, segments: tuple[int, ...]
) -> PackedConv | PackedLinear | None:
    if conv is None:
        return None
    # a linear layer quantizes pixel by pixel, a convolution image by image
    return packer.linear(name, conv) if len(segments) == 1 else pack_conv(packer, name, conv, segments)


def pack_conv(
    packer: Packer, name: str, conv: nn.Conv2d, segments: tuple[int, ...] | None = None, **how
) -> PackedConv:
    """Packs a convolution; raises UnsupportedError for kinds that the kernels don't know."""
    check_conv(name, conv)
    return packer.conv(name, conv, segments, **how)


def check_conv(name: str, conv: nn.Conv2d) -> None:
    """Raises UnsupportedError for a convolution that the kernels don't know."""
    if is_coded(conv):
        return
    plain = type(conv) is nn.Conv2d and conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    require(plain and not isinstance(conv.padding, str), f"{name} is not a plain convolution")
    require(len(set(conv.kernel_size)) == len(set(conv.stride)) == 1, f"{name} has a kernel that is not square")


def _check_resnet(name: str, resnet: nn.Module) -> None:
    require(type(resnet).__name__ in _RESNETS, f"{name} is a {type(resnet).__name__}")
    require(is_missing(resnet, "upsample") and is_missing(resnet, "downsample"), f"{name} changes the resolution")
    require(getattr(resnet, "output_scale_factor", 1.0) == 1.0, f"{name} scales its result")
    require(is_silu(getattr(resnet, "nonlinearity", None)), f"{name} has another activation than SiLU")
    kind = getattr(resnet, "time_embedding_norm", "default")
    # decoders say "group", which means nothing where no time comes in
    known = ("default", "scale_shift") if not is_missing(resnet, "time_emb_proj") else ("default", "group")
    require(kind in known, f"{name} has time_embedding_norm {kind}")


def is_silu(activation: nn.Module | None) -> bool:
    """Whether an activation is SiLU, which blocks without the attribute have built in."""
    return activation is None or type(activation) is nn.SiLU


def is_missing(module: nn.Module, name: str) -> bool:
    """Whether a module has no attribute of this name, or None in it."""
    return getattr(module, name, None) is None
