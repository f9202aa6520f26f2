"""Matrix products by oneDNN through torch, on weights that are prepacked once: also where torch would call another library."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from fastdiff.ops import conv2d_call
from fastdiff.ops.linear_call import columns, finish
from fastdiff.ops.packing import unpack, unpack_conv

Tensor = torch.Tensor
_ATTRIBUTES = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # our weight -> (what it was made from, the library's)


def onednn_missing() -> str | None:
    """Why oneDNN cannot run here at all, or None."""
    return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"


def _refuse(x, weight, out_dtype, *others) -> str | None:
    """What oneDNN's kernels in torch don't do: they return the dtype of the weights."""
    if x.numel() == 0 or weight.numel() == 0:
        return "x and weight must have elements"
    if weight.dtype == torch.float32:
        return "computes in float32" if torch.float64 in (x.dtype, out_dtype) else None
    if weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "needs a float32 weight, or a bfloat16 one on a CPU that multiplies it"
    if out_dtype != torch.bfloat16 or any(other is not None for other in others):
        return "rounds to bfloat16 before anything but bias and activation"
    return None


def refuse_linear(x, weight, out_features, bias, activation, gate, residual, out_dtype) -> str | None:
    """Why oneDNN cannot serve this call of `linear`, or None."""
    pairs = activation not in _ATTRIBUTES and weight.dtype == torch.bfloat16
    return "rounds to bfloat16 before pairs meet" if pairs else _refuse(x, weight, out_dtype, gate, residual)


def run_linear(x, weight, out_features, bias, activation, gate, residual, out_dtype) -> Tensor:
    """`linear` by oneDNN; what it does not fuse follows in torch."""
    brain = weight.dtype == torch.bfloat16
    wide = out_features if brain else 16 * weight.shape[0]
    make = lambda: torch.ops.mkldnn._reorder_linear_weight(unpack(weight, wide, x.shape[-1]))
    packed = prepacked(weight, (wide, x.shape[-1]), make)
    name, algorithm = _ATTRIBUTES[activation] if brain else _ATTRIBUTES["none"]
    x = x.to(weight.dtype).contiguous()
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias if brain else None, name, [], algorithm)
    if brain:
        return y
    return finish(y, columns(out_features, activation), bias, activation, gate, residual, None, out_dtype)


def refuse_conv2d(
    x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype
) -> str | None:
    """Why oneDNN cannot serve this call of `conv2d`, or None."""
    return _refuse(x, weight, out_dtype, emb, residual)


def run_conv2d(
    x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype
) -> Tensor:
    """`conv2d` by oneDNN, channels last; what it does not fuse comes before or after it in torch."""
    channels = [x.shape[3]] if x2 is None else [x.shape[3], x2.shape[3]]
    planes = (x if x2 is None else torch.cat([x.to(weight.dtype), x2.to(weight.dtype)], 3)).to(weight.dtype)
    planes = planes.permute(0, 3, 1, 2)
    if upsample == 2:
        planes = planes.repeat_interleave(2, 2).repeat_interleave(2, 3)
    left, right, top, bottom = padding
    if left != right or top != bottom:
        planes, top, left = F.pad(planes, padding), 0, 0
    planes = planes.contiguous(memory_format=torch.channels_last)
    geometry = [top, left], [stride, stride], [1, 1], 1  # padding, stride, dilation, groups
    make = lambda: torch.ops.mkldnn._reorder_convolution_weight(
        unpack_conv(weight, out_channels, channels, kernel), *geometry, list(planes.shape)
    )
    packed = prepacked(weight, (out_channels, *channels, kernel, stride, top, left), make)
    brain = weight.dtype == torch.bfloat16
    y = torch.ops.mkldnn._convolution_pointwise(planes, packed, bias if brain else None, *geometry, "none", [], "")
    y = y.permute(0, 2, 3, 1)
    return (y if brain else conv2d_call.finish(y, bias, emb, residual).to(out_dtype)).contiguous()


def prepacked(weight: Tensor, key: tuple, make: Callable[[], Tensor]) -> Tensor:
    """A library's form of one of our weights, kept as long as the weight lives and is not written to."""
    origin = (*key, None if weight.is_inference() else weight._version)
    known = _kept.get(weight)
    if known is None or known[0] != origin:
        known = _kept[weight] = (origin, make())
    return known[1]
