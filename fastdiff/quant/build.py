"""One layer: from a floating-point module and its statistics to a quantized one, and back from stored tensors."""

import dataclasses

import torch
from torch import nn

from fastdiff.quant import formats
from fastdiff.quant.conv import QConv2d, QSplit, as_matrix
from fastdiff.quant.gptq import gptq
from fastdiff.quant.hadamard import block_of, rotate
from fastdiff.quant.layer import QLayer
from fastdiff.quant.linear import QLinear
from fastdiff.quant.lowrank import split_low_rank
from fastdiff.quant.measures import energies, sqnr_db
from fastdiff.quant.observers import ChannelObserver
from fastdiff.quant.qtensor import QTensor, quantize
from fastdiff.quant.schemes import LowRank, Rotate, Scheme, Smooth
from fastdiff.quant.smoothing import search_scale, smooth_scale

Tensor = torch.Tensor


def build_layer(layer: nn.Module, scheme: Scheme, stats: ChannelObserver | None = None) -> nn.Module:
    """The quantized form of an nn.Linear or nn.Conv2d; ranges of static activations are set later.

    stats  of the layer's inputs, for smoothing and GPTQ
    """
    return build_measured(layer, scheme, stats)[0]


def build_measured(
    layer: nn.Module, scheme: Scheme, stats: ChannelObserver | None = None, smooth: Tensor | None = None
) -> tuple[nn.Module, tuple[float, float]]:
    """`build_layer`, and the energies of the weight and of its error.

    smooth  factors that the layer shares with others over the same input; None chooses its own
    """
    if scheme.split_input is not None:
        return _split(layer, scheme)
    if isinstance(layer, nn.Conv2d):
        weight = as_matrix(layer.weight.detach().float())
        rounded = _round(weight, scheme, stats and stats.hessian)
        return QConv2d(rounded, layer, scheme), energies(weight, rounded.dequantize())
    return _build_linear(layer, scheme, stats, smooth)


def weight_sqnr_db(layer: nn.Module, quantized: nn.Module) -> float:
    """Signal-to-noise ratio of the weight that the quantized layer applies."""
    if isinstance(quantized, QSplit):
        dense = torch.cat((quantized.first.dense(), quantized.second.dense()), 1)
    else:
        dense = quantized.dense()
    return sqnr_db(layer.weight, dense)


def restore_layer(layer: nn.Module, scheme: Scheme, tensors: dict[str, Tensor]) -> nn.Module:
    """The quantized layer whose state dict is `tensors`; `layer` gives sizes only and may be on the meta device."""
    if scheme.split_input is not None:
        parts = [{k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("first.", "second.")]
        made = [restore_layer(*_part(layer, scheme, i), tensors=part) for i, part in enumerate(parts)]
        return QSplit(*made, scheme.split_input, -1 if isinstance(layer, nn.Linear) else 1)
    codes, n = tensors["weight"].flatten(1), tensors["weight"].shape[0]
    k = layer.weight[0].numel()
    if scheme.weight.bits == 4:
        codes = formats.unpack_nibbles(codes, k, signed=scheme.weight.dtype == "int4")
    column = lambda v: None if v is None else v.reshape(n, -1)
    get = tensors.get
    quantized = QTensor(
        codes, column(get("weight_scale")), column(get("weight_zero")), scheme.weight, get("weight_scale2")
    )
    made: QLayer
    if isinstance(layer, nn.Conv2d):
        made = QConv2d(quantized, _without_bias(layer), scheme, k // (layer.kernel_size[0] * layer.kernel_size[1]))
    else:
        made = QLinear(quantized, None, scheme, get("smooth"), _rotation(scheme, k))
        made.lowrank_down, made.lowrank_up = get("lowrank_down"), get("lowrank_up")
    for name in ("bias", "input_scale", "input_zero"):
        setattr(made, name, get(name))
    return made


def _build_linear(
    layer: nn.Linear, scheme: Scheme, stats: ChannelObserver | None, smooth: Tensor | None
) -> tuple[QLinear, tuple[float, float]]:
    weight = layer.weight.detach().float()
    hessian = None if stats is None else stats.hessian
    smooth = smoothing_of(weight, scheme, stats) if smooth is None else smooth
    if smooth is not None:
        weight = weight * smooth
        hessian = None if hessian is None else hessian / (smooth[:, None] * smooth).double()
    branch, low_rank = None, scheme.transform(LowRank)
    if low_rank is not None:
        _, *branch = split_low_rank(weight, scheme.weight, low_rank.rank, low_rank.iters, hessian)
        weight = weight - branch[0] @ branch[1]
    rotation = _rotation(scheme, weight.shape[1])
    if rotation > 1:
        weight = rotate(weight, rotation)
        hessian = None if hessian is None else rotate(rotate(hessian, rotation).T, rotation)
    rounded = _round(weight, scheme, hessian)
    made = QLinear(rounded, layer.bias, scheme, smooth, rotation)
    if branch is not None:
        made.set_low_rank(*branch)
    if smooth is None and branch is None:  # rotation changes neither energy
        return made, energies(weight, rounded.dequantize())
    return made, energies(layer.weight, made.dense())


def _round(weight: Tensor, scheme: Scheme, hessian: Tensor | None) -> QTensor:
    """Codes of the weight; learned rounding starts from the nearest ones."""
    rounding = scheme.rounding
    if rounding.kind == "gptq":
        return gptq(weight, hessian, scheme.weight, rounding.damp, rounding.block)
    return quantize(weight, scheme.weight)


def smoothing_of(weight: Tensor, scheme: Scheme, stats: ChannelObserver | None) -> Tensor | None:
    """The factors [K] that a scheme divides inputs by and multiplies the weight [N, K] with; None without smoothing."""
    smooth = scheme.transform(Smooth)
    if smooth is None:
        return None
    if smooth.alpha is None:
        return search_scale(weight, stats.hessian, stats.amax, scheme.weight, scheme.input)
    return smooth_scale(stats.amax, weight.abs().amax(0), smooth.alpha)


def _rotation(scheme: Scheme, k: int) -> int:
    rotation = scheme.transform(Rotate)
    return 1 if rotation is None else block_of(k, rotation.group)


def _split(layer: nn.Module, scheme: Scheme) -> tuple[QSplit, tuple[float, float]]:
    parts, sums = zip(*(build_measured(*_part(layer, scheme, i)) for i in range(2)), strict=True)
    made = QSplit(*parts, scheme.split_input, -1 if isinstance(layer, nn.Linear) else 1)
    return made, (sums[0][0] + sums[1][0], sums[0][1] + sums[1][1])


def _part(layer: nn.Module, scheme: Scheme, index: int) -> tuple[nn.Module, Scheme]:
    """The layer over one part of its input; the bias belongs to the first."""
    cut, rest = scheme.split_input, layer.weight.shape[1] - scheme.split_input
    begin, count = (0, cut) if index == 0 else (cut, rest)
    bias = layer.bias is not None and index == 0
    N = layer.weight.shape[0]
    with torch.device(layer.weight.device):
        if isinstance(layer, nn.Conv2d):
            part = nn.Conv2d(count, N, layer.kernel_size, layer.stride, layer.padding, bias=bias)
        else:
            part = nn.Linear(count, N, bias=bias)
    part.weight = nn.Parameter(layer.weight.detach()[:, begin : begin + count], requires_grad=False)
    if bias:
        part.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return part, dataclasses.replace(scheme, split_input=None)


def _without_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """The geometry of a convolution, without values."""
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    with torch.device("meta"):
        return nn.Conv2d(*sizes, bias=False)
