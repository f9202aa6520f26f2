"""`depthwise_conv2d` in Triton: contract in `fastdiff/ops/depthwise_conv2d.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast

PIXELS, CHANNELS = 16, 64  # of a tile: 128 bytes of bfloat16 a pixel, one 16-byte load a thread and tap
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["pixels", "height", "width", "tiles"])
def depthwise_conv2d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    height,
    width,
    channels,
    n,
    tiles,
    GATED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Program (tile of channels, tile of `pixels` of all samples); n channels come out, of `channels` that go in.

    Tiles of pixels are next to each other in time: the rows above and below come from the L2 cache. GATED: the n gates
    of a pixel follow its n values.
    """
    program = tl.program_id(0)
    pixel = (program % tiles).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    c = (program // tiles) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists, used = pixel < pixels, c < n
    y, x = (pixel // width % height).to(tl.int32), (pixel % width).to(tl.int32)
    source = x_ptr + pixel * channels + c
    value = tl.zeros((PIXELS, CHANNELS), tl.float32)
    gate = value
    if bias_ptr is not None:
        value += tl.load(bias_ptr + c, mask=used, other=0.0)
        if GATED:
            gate += tl.load(bias_ptr + n + c, mask=used, other=0.0)
    for tap in tl.static_range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        within = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        at = source + (dy * width + dx).to(tl.int64) * channels
        inside = exists & within & used
        row = weight_ptr + tap * channels + c
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.load(row, mask=used, other=0.0)
        if GATED:
            gate += tl.load(at + n, mask=inside, other=0.0).to(tl.float32) * tl.load(row + n, mask=used, other=0.0)
    if GATED:
        value *= gate / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + pixel * n + c, cast(value, out_ptr.dtype.element_ty), mask=exists & used)


def depthwise_conv2d_triton(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool
) -> None:
    """Fills contiguous out [B, H, W, n] from contiguous x [B, H, W, C], C = 2 n where gated."""
    if out.numel() == 0:
        return
    B, H, W, n = out.shape
    tiles = triton.cdiv(B * H * W, PIXELS)
    depthwise_conv2d_kernel[(tiles * triton.cdiv(n, CHANNELS),)](
        *(x, weight, bias, out, B * H * W, H, W, x.shape[3], n, tiles),
        GATED=gated,
        PIXELS=PIXELS,
        CHANNELS=CHANNELS,
        **OPTIONS,
    )
