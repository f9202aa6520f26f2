"""`resample` in Triton: contract in `fastdiff/ops/resample.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast

TILE = 1024  # elements read at once by a program
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["pixels", "width", "columns"])
def resample_kernel(
    x_ptr,
    out_ptr,
    pixels,
    height,
    width,
    x_width,
    x_height,
    C,
    columns,
    AVERAGE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Program (tile of pixels, column of channels); `pixels` of all samples, [height, width], are those of the smaller image.

    x_height and x_width are the size of x: an odd last row or column is left out by an average.
    """
    program = tl.program_id(0)
    pixel = (program // columns).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    c = (program % columns) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels) & (c < C)
    b, y, x = pixel // width // height, pixel // width % height, pixel % width
    if AVERAGE:
        corner = x_ptr + ((b * x_height + 2 * y) * x_width + 2 * x) * C + c
        below = corner + x_width.to(tl.int64) * C
        first = tl.load(corner, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(below, mask=inside, other=0.0).to(tl.float32)
        first += tl.load(corner + C, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(below + C, mask=inside, other=0.0).to(tl.float32)
        mean = cast((first + second) * 0.25, out_ptr.dtype.element_ty)
        tl.store(out_ptr + pixel * C + c, mean, mask=inside)
    else:
        value = tl.load(x_ptr + pixel * C + c, mask=inside, other=0.0)
        corner = out_ptr + ((b * 2 * height + 2 * y) * 2 * width + 2 * x) * C + c
        below = corner + 2 * width.to(tl.int64) * C
        tl.store(corner, value, mask=inside)
        tl.store(corner + C, value, mask=inside)
        tl.store(below, value, mask=inside)
        tl.store(below + C, value, mask=inside)


def tile_of(channels: int) -> tuple[int, int]:
    """PIXELS and CHANNELS."""
    width = 128 if channels % 128 == 0 else min(max(triton.next_power_of_2(channels), 8), 64)
    return TILE // width, width


def resample_triton(out: torch.Tensor, x: torch.Tensor, average: bool) -> None:
    """Fills contiguous out [B, H', W', C] from contiguous x [B, H, W, C]."""
    if out.numel() == 0:
        return
    B, height, width, C = (out if average else x).shape
    PIXELS, CHANNELS = tile_of(C)
    pixels, columns = B * height * width, triton.cdiv(C, CHANNELS)
    resample_kernel[(triton.cdiv(pixels, PIXELS) * columns,)](
        *(x, out, pixels, height, width, x.shape[2], x.shape[1], C, columns),
        AVERAGE=average,
        PIXELS=PIXELS,
        CHANNELS=CHANNELS,
        **OPTIONS,
    )
