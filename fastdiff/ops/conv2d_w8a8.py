"""2-D convolution of int8 codes with int8 weights; activations are quantized on the way in."""

from collections.abc import Iterator

import torch

from fastdiff.ops import conv2d_call as plain
from fastdiff.ops import memory, native
from fastdiff.ops.conv2d_samples import SHAPES
from fastdiff.ops.conv2d_samples import make_int8_call as make_call
from fastdiff.ops.linear_samples import layouts
from fastdiff.ops.packing import padded_channels, refuse_panels, refuse_rows, unpack_conv
from fastdiff.ops.promote import FLOATS
from fastdiff.ops.registry import op

MOST_PRODUCTS = 133_000  # 127 * 127 * this is the largest int32


def _check(
    x, x_scale, x2, x2_scale, weight, weight_scale, weight_sum, out_channels, kernel, stride, padding, upsample,
    bias, emb, residual, out_scale, out_dtype,
) -> None:  # fmt: skip
    images = [x] if x2 is None else [x, x2]
    name, channels = "conv2d_w8a8", [image.shape[-1] for image in images]
    plain.check_images(name, images, (*FLOATS, torch.int8))
    plain.check_geometry(name, x, kernel, stride, padding, upsample)
    for image, scale in zip(images, (x_scale, x2_scale), strict=False):
        _check_scale(image, scale)
    if weight.dtype != torch.int8:
        raise TypeError(f"{name}: weight must be int8, got {weight.dtype}")
    plain.check_weight(name, weight, channels, out_channels, kernel)
    if max(channels) * kernel * kernel > MOST_PRODUCTS:
        raise ValueError(f"{name}: channels * kernel^2 must be at most {MOST_PRODUCTS}, got {channels}, {kernel}")
    _check_vector("weight_scale", weight_scale, torch.float32, (out_channels,))
    _check_vector("weight_sum", weight_sum, torch.int32, (len(images), kernel * kernel, out_channels))
    if (out_dtype == torch.int8) != (out_scale is not None) or out_dtype not in (*FLOATS, torch.int8):
        raise TypeError(f"{name}: out_dtype must be a float, or int8 with an out_scale, got {out_dtype}")
    if out_scale is not None:
        _check_vector("out_scale", out_scale, torch.float32, (1,))
    shape = plain.output_shape(x, out_channels, kernel, stride, padding, upsample)
    plain.check_epilogue(name, shape, bias, emb, residual, x.device)


def _check_scale(x: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is None:
        if x.dtype == torch.int8:
            raise ValueError("conv2d_w8a8: x_scale expected for int8 x, got None; pass its scale [1] or [B]")
        return
    if scale.dtype != torch.float32 or scale.shape not in ((1,), (x.shape[0],)) or not scale.is_contiguous():
        raise ValueError(
            f"conv2d_w8a8: x_scale must be float32 [1] or [{x.shape[0]}], got {scale.dtype} {list(scale.shape)}"
        )


def _check_vector(what: str, value: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape or not value.is_contiguous():
        raise ValueError(
            f"conv2d_w8a8: {what} must be contiguous {dtype} {list(shape)}, got {value.dtype} {list(value.shape)}"
        )


def quantize_samples(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in [-127, 127] as float64, and one scale per sample; `scale` None takes the sample's largest magnitude."""
    batch = x.shape[0]
    if x.dtype == torch.int8:
        return x.double(), scale.expand(batch)
    wide = x.float()
    if scale is None:
        amax = wide.abs().flatten(1).amax(dim=1)
        scale = torch.where(amax.isfinite(), amax * (1 / 127), torch.full_like(amax, float("nan")))
        inverse = torch.where(amax > 0, torch.full_like(amax, 127) / amax, torch.zeros_like(amax))
    else:
        scale = scale.expand(batch).float()
        inverse = 1 / scale
    codes = (wide * inverse[:, None, None, None]).nan_to_num(0.0, 127.0, -127.0).round().clamp(-127, 127)
    return codes.double(), scale


@op(check=_check)
def conv2d_w8a8(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x2: torch.Tensor | None,
    x2_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_sum: torch.Tensor,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: list[int],
    upsample: int,
    bias: torch.Tensor | None,
    emb: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Convolves int8 codes of channels-last images with int8 weights; conv2d says what the sizes mean.

    x             [B, H, W, C1] float32, bfloat16 or float16 (quantized here), or int8 codes in [-127, 127]
    x_scale       [1] or [B] float32: x = code * scale. None, for a float x: each sample's largest magnitude / 127
    x2, x2_scale  the second segment [B, H, W, C2], with a scale of its own, or None
    weight        packing.pack_conv of int8 codes [N, C1 + C2, kernel, kernel]
    weight_scale  [N] float32
    weight_sum    packing.conv_weight_sums of the same codes: [segments, kernel * kernel, N] int32
    bias, emb, residual    as in conv2d
    out_scale     [1] float32 for int8 results: code = clamp(rint(y * (1 / out_scale)), -127, 127)
    out           [B, Ho, Wo, N] in out_dtype, a float or int8

    code = clamp(rint(x * (127 / amax or 1 / scale)), -127, 127) in float32, rint to nearest even. Sums of products are
    exact integers; then, in float32, y = sum * x_scale * weight_scale, the segments' terms added, + bias + emb +
    residual. A dynamic sample that holds a NaN or an infinity is NaN throughout. Bits are the same on every CPU.
    """
    images = [(x, x_scale)] if x2 is None else [(x, x_scale), (x2, x2_scale)]
    unpacked = unpack_conv(weight, out_channels, [image.shape[3] for image, _ in images], kernel).double()
    y, first = None, 0
    for image, scale in images:
        codes, scales = quantize_samples(image, scale)
        part = unpacked[:, first : first + image.shape[3]]
        sums = plain.convolve(codes, part, stride, padding, upsample).to(weight_scale.dtype)  # exact before `to`
        term = sums * scales.to(sums.dtype)[:, None, None, None] * weight_scale
        y, first = term if y is None else y + term, first + image.shape[3]
    y = plain.finish(y, bias, emb, residual).contiguous()
    if out_scale is not None:
        y = (y * (1 / out_scale)).nan_to_num(0.0).round().clamp(-127, 127)
    return y if weight_scale.dtype == torch.float64 else y.to(out_dtype)


def _refuse_cpu(x, x_scale, x2, x2_scale, weight, *rest) -> str | None:
    return refuse_rows(weight)


@conv2d_w8a8.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse_cpu)
def _(
    x, x_scale, x2, x2_scale, weight, weight_scale, weight_sum, out_channels, kernel, stride, padding, upsample,
    bias, emb, residual, out_scale, out_dtype,
):  # fmt: skip
    out = memory.empty(plain.output_shape(x, out_channels, kernel, stride, padding, upsample), out_dtype)
    images = ((x, x_scale), (x2, x2_scale))
    segments = [(i, scale, 0 if scale is None else scale.shape[0]) for i, scale in images if i is not None]
    sizes = (*x.shape[:3], *out.shape[1:], kernel, stride, padding[0], padding[2], upsample)
    plain.run_native(segments, weight, weight_sum, weight_scale, out, sizes, bias, emb, residual, out_scale)
    return out


def _refuse_triton(
    x, x_scale, x2, x2_scale, weight, weight_scale, weight_sum, out_channels, kernel, stride, padding, upsample, *rest
) -> str | None:
    shape = plain.output_shape(x, out_channels, kernel, stride, padding, upsample)
    return refuse_panels(weight) or plain.refuse_pixels(x, shape)


@conv2d_w8a8.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(
    x, x_scale, x2, x2_scale, weight, weight_scale, weight_sum, out_channels, kernel, stride, padding, upsample,
    bias, emb, residual, out_scale, out_dtype,
):  # fmt: skip
    from fastdiff.kernels.conv2d_codes import codes_of
    from fastdiff.kernels.conv2d_launch import Sizes, conv2d_triton

    shape = plain.output_shape(x, out_channels, kernel, stride, padding, upsample)
    out = memory.empty(shape, out_dtype, x.device)
    if out.numel() == 0:
        return out
    images = [(i, scale) for i, scale in ((x, x_scale), (x2, x2_scale)) if i is not None]
    segments = [(i, scale) if i.dtype == torch.int8 else codes_of(i, scale) for i, scale in images]
    padded = padded_channels(weight, [i.shape[3] for i, _ in images], kernel)
    sizes = Sizes(*x.shape[:3], *shape[1:3], kernel, stride, padding[0], padding[2], upsample)
    conv2d_triton(out, segments, weight, padded, sizes, weight_scale, bias, emb, residual, out_scale)
    return out


@conv2d_w8a8.sample
def _(device) -> Iterator[tuple]:
    for layout in layouts(device):
        yield from _samples(device, layout)


def _samples(device, layout: str) -> Iterator[tuple]:
    make = lambda *args, **options: make_call(*args, device=device, layout=layout, **options)
    for seed, shape in enumerate(SHAPES):
        yield make(shape, seed=seed)
        yield make(shape, torch.int8, seed=seed + 1)
    for dtype in FLOATS:
        for seed in (2, 6, 9, 11):
            yield make(SHAPES[seed], dtype, dtype, True, seed)
    for dtype in (torch.float32, torch.int8):
        for seed in (2, 7, 9):
            yield make(SHAPES[seed], dtype, torch.int8, True, seed)
    for value in (float("nan"), float("inf")):
        spoilt = make(SHAPES[3], seed=3)
        spoilt[0][1, 2, 3, 4] = value
        yield spoilt
    dark = make(SHAPES[3], seed=2)
    dark[0][1] = 0
    yield dark
