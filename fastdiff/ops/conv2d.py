"""2-D convolution over channels-last images, on packed weights."""

from collections.abc import Iterator

import torch

from fastdiff.ops import cudnn, memory, native, onednn
from fastdiff.ops.conv2d_call import (
    check_epilogue,
    check_geometry,
    check_images,
    check_weight,
    convolve,
    finish,
    output_shape,
    refuse_pixels,
    run_native,
)
from fastdiff.ops.conv2d_samples import SHAPES, make_call
from fastdiff.ops.linear_samples import layouts
from fastdiff.ops.packing import in_rows, padded_channels, refuse_panels, refuse_rows, unpack_conv
from fastdiff.ops.promote import FLOATS
from fastdiff.ops.registry import op


def _check(x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype) -> None:
    images = [x] if x2 is None else [x, x2]
    check_images("conv2d", images, FLOATS)
    check_geometry("conv2d", x, kernel, stride, padding, upsample)
    if weight.dtype not in FLOATS or out_dtype not in FLOATS:
        raise TypeError(f"conv2d: weight and out_dtype must be floats, got {weight.dtype} and {out_dtype}")
    if weight.dtype == torch.float16 and not in_rows(weight):
        raise TypeError('conv2d: float16 weights are for GPUs; pack them with layout="rows"')
    check_weight("conv2d", weight, [i.shape[3] for i in images], out_channels, kernel)
    shape = output_shape(x, out_channels, kernel, stride, padding, upsample)
    check_epilogue("conv2d", shape, bias, emb, residual, x.device)


@op(check=_check)
def conv2d(
    x: torch.Tensor,
    x2: torch.Tensor | None,
    weight: torch.Tensor,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: list[int],
    upsample: int,
    bias: torch.Tensor | None,
    emb: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Convolves channels-last images with square kernels; adds bias, time embedding and residual in the same pass.

    x         [B, H, W, C1] float32, bfloat16 or float16, contiguous
    x2        [B, H, W, C2] | None: channels that follow those of x, without a concatenation
    weight    packing.pack_conv of [N, C1 + C2, kernel, kernel], float32, bfloat16 or (in rows) float16
    stride    >= 1
    padding   left, right, top, bottom, >= 0: zeros around the (upsampled) image
    upsample  1, or 2: each pixel is seen as 2 x 2 pixels
    bias      [N] float32 | None
    emb       [B, N] float32 | None, rows may be strided: added to every pixel of a sample
    residual  [B, Ho, Wo, N] float | None
    out       [B, Ho, Wo, N] in out_dtype, a float

    x is converted to the dtype of the weights; products are added up in float32, and so is the rest. A pixel's bits
    depend on what its kernel sees only, not on the batch or on the number of threads. An empty batch gives an empty
    result.
    """
    image = x if x2 is None else torch.cat([x.to(weight.dtype), x2.to(weight.dtype)], dim=3)
    channels = [x.shape[3]] if x2 is None else [x.shape[3], x2.shape[3]]
    wide = torch.promote_types(weight.dtype, torch.float32)
    unpacked = unpack_conv(weight, out_channels, channels, kernel)
    y = convolve(image.to(weight.dtype).to(wide), unpacked.to(wide), stride, padding, upsample)
    y = finish(y, bias, emb, residual).contiguous()
    return y if wide == torch.float64 else y.to(out_dtype)


def _refuse_cpu(x, x2, weight, *rest) -> str | None:
    return refuse_rows(weight)


@conv2d.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse_cpu)
def _(x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype):
    out = memory.empty(output_shape(x, out_channels, kernel, stride, padding, upsample), out_dtype)
    segments = [(image, None, 0) for image in (x, x2) if image is not None]
    sizes = (*x.shape[:3], *out.shape[1:], kernel, stride, padding[0], padding[2], upsample)
    run_native(segments, weight, None, None, out, sizes, bias, emb, residual, None)
    return out


def _refuse_onednn(x, x2, weight, *rest) -> str | None:
    return refuse_rows(weight) or onednn.refuse_conv2d(x, x2, weight, *rest)


conv2d.variant("onednn", ("cpu",), onednn.onednn_missing, _refuse_onednn)(onednn.run_conv2d)
conv2d.variant("cudnn", ("cuda",), cudnn.cudnn_missing, cudnn.refuse_conv2d)(cudnn.run_conv2d)


def _refuse_triton(x, x2, weight, out_channels, kernel, stride, padding, upsample, *rest) -> str | None:
    return refuse_panels(weight) or refuse_pixels(x, output_shape(x, out_channels, kernel, stride, padding, upsample))


@conv2d.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype):
    from fastdiff.kernels.conv2d_launch import Sizes, conv2d_triton

    out = memory.empty(output_shape(x, out_channels, kernel, stride, padding, upsample), out_dtype, x.device)
    segments = [(image, None) for image in (x, x2) if image is not None]
    padded = padded_channels(weight, [image.shape[3] for image, _ in segments], kernel)
    sizes = Sizes(*x.shape[:3], *out.shape[1:3], kernel, stride, padding[0], padding[2], upsample)
    conv2d_triton(out, segments, weight, padded, sizes, None, bias, emb, residual, None)
    return out


@conv2d.sample
def _(device) -> Iterator[tuple]:
    for layout in layouts(device):
        yield from _samples(device, layout)


def _samples(device, layout: str) -> Iterator[tuple]:
    make = lambda *args, **options: make_call(*args, device=device, layout=layout, **options)
    for seed, shape in enumerate(SHAPES):
        yield make(shape, seed=seed)
        yield make(shape, weights=torch.bfloat16, seed=seed + 1)
    for dtype in FLOATS[1:]:
        for seed in (2, 6, 9, 11):
            yield make(SHAPES[seed], dtype, dtype if layout == "rows" else torch.bfloat16, seed)
        yield make(SHAPES[9], dtype, seed=3)
    bare = list(make(SHAPES[2]))
    bare[8:] = [None, None, None, torch.float16]
    yield tuple(bare)
    yield make(SHAPES[3], seed=5, size=1e18)
    spoilt = make(SHAPES[3], seed=4)
    spoilt[0][1, 2, 3, 4] = float("nan")
    yield spoilt
    if layout == "rows":  # nothing that a library could not do
        for seed in (3, 11):
            plain = list(make(SHAPES[seed], torch.bfloat16, torch.bfloat16, seed))
            plain[9:11] = [None, None]
            yield tuple(plain)
