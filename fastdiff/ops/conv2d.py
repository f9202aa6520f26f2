"""2-D convolution over channels-last images, on packed weights."""

from collections.abc import Iterator

import torch

from fastdiff.ops import memory, native, onednn
from fastdiff.ops.conv2d_call import (
    check_epilogue,
    check_geometry,
    check_images,
    check_weight,
    convolve,
    finish,
    output_shape,
    run_native,
)
from fastdiff.ops.conv2d_samples import SHAPES, make_call
from fastdiff.ops.packing import unpack_conv
from fastdiff.ops.promote import FLOATS
from fastdiff.ops.registry import op


def _check(x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype) -> None:
    images = [x] if x2 is None else [x, x2]
    check_images("conv2d", images, FLOATS)
    check_geometry("conv2d", x, kernel, stride, padding, upsample)
    if weight.dtype not in (torch.float32, torch.bfloat16) or out_dtype not in FLOATS:
        raise TypeError(
            f"conv2d: weight must be float32 or bfloat16 and out_dtype a float, got {weight.dtype} and {out_dtype}"
        )
    group = 1 if weight.dtype == torch.float32 else 2
    check_weight("conv2d", weight, group, [i.shape[3] for i in images], out_channels, kernel)
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
    weight    packing.pack_conv of [N, C1 + C2, kernel, kernel], float32 or bfloat16
    stride    >= 1
    padding   left, right, top, bottom, >= 0: zeros around the (upsampled) image
    upsample  1, or 2: each pixel is seen as 2 x 2 pixels
    bias      [N] float32 | None
    emb       [B, N] float32 | None, rows may be strided: added to every pixel of a sample
    residual  [B, Ho, Wo, N] float | None
    out       [B, Ho, Wo, N] in out_dtype, a float

    x is rounded to the dtype of the weights; products are added up in float32, and so is the rest. A pixel's bits
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


@conv2d.variant("cpu", devices=("cpu",), missing=native.cpu_missing)
def _(x, x2, weight, out_channels, kernel, stride, padding, upsample, bias, emb, residual, out_dtype):
    out = memory.empty(output_shape(x, out_channels, kernel, stride, padding, upsample), out_dtype)
    segments = [(image, None, 0) for image in (x, x2) if image is not None]
    sizes = (*x.shape[:3], *out.shape[1:], kernel, stride, padding[0], padding[2], upsample)
    run_native(segments, weight, None, None, out, sizes, bias, emb, residual, None)
    return out


conv2d.variant("onednn", ("cpu",), onednn.onednn_missing, onednn.refuse_conv2d)(onednn.run_conv2d)


@conv2d.sample
def _(device) -> Iterator[tuple]:
    for seed, shape in enumerate(SHAPES):
        yield make_call(shape, seed=seed, device=device)
        yield make_call(shape, weights=torch.bfloat16, seed=seed + 1, device=device)
    for dtype in FLOATS[1:]:
        for seed in (2, 6, 9, 11):
            yield make_call(SHAPES[seed], dtype, torch.bfloat16, seed, device)
        yield make_call(SHAPES[9], dtype, seed=3, device=device)
    bare = list(make_call(SHAPES[2], device=device))
    bare[8:] = [None, None, None, torch.float16]
    yield tuple(bare)
    yield make_call(SHAPES[3], seed=5, device=device, size=1e18)
    spoilt = make_call(SHAPES[3], seed=4, device=device)
    spoilt[0][1, 2, 3, 4] = float("nan")
    yield spoilt
