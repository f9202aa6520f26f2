"""Calls of the convolutions: what tests and benchmarks run them with."""

import torch

from fastdiff.ops.conv2d_call import output_shape
from fastdiff.ops.packing import conv_weight_sums, pack_conv

# batch, height, width, channels, channels of the second segment, outputs, kernel, stride, padding, upsample
SHAPES = (
    (1, 1, 1, 1, 0, 1, 1, 1, (0, 0, 0, 0), 1),
    (1, 1, 1, 3, 0, 2, 3, 1, (1, 1, 1, 1), 1),
    (2, 5, 7, 13, 0, 17, 3, 1, (1, 1, 1, 1), 1),
    (3, 8, 8, 16, 0, 32, 3, 1, (1, 1, 1, 1), 1),
    (2, 4, 4, 32, 0, 48, 3, 2, (1, 1, 1, 1), 1),
    (2, 9, 6, 5, 0, 19, 3, 2, (0, 1, 0, 1), 1),
    (2, 3, 4, 7, 0, 33, 3, 1, (1, 1, 1, 1), 2),
    (1, 11, 13, 4, 0, 64, 3, 1, (1, 1, 1, 1), 1),
    (2, 7, 7, 64, 0, 4, 3, 1, (1, 1, 1, 1), 1),
    (2, 6, 5, 24, 8, 40, 3, 1, (1, 1, 1, 1), 1),
    (2, 6, 5, 3, 11, 81, 3, 2, (2, 0, 1, 3), 2),
    (2, 7, 5, 31, 0, 65, 1, 1, (0, 0, 0, 0), 1),
    (2, 7, 5, 12, 20, 16, 1, 1, (0, 0, 0, 0), 1),
    (1, 9, 9, 6, 0, 10, 5, 1, (2, 2, 2, 2), 1),
    (1, 9, 10, 3, 0, 5, 7, 2, (3, 3, 3, 3), 1),
    (2, 8, 6, 4, 0, 23, 2, 2, (0, 0, 0, 0), 1),
    (2, 5, 5, 2, 0, 3, 1, 2, (1, 0, 0, 1), 1),
    (0, 4, 4, 3, 0, 5, 3, 1, (1, 1, 1, 1), 1),
    (1, 40, 39, 6, 0, 70, 3, 1, (1, 1, 1, 1), 1),
)


def make_call(
    shape, dtype=torch.float32, weights=torch.float32, seed=0, device="cpu", size=1.0, layout="panels"
) -> tuple:
    """Arguments of conv2d for a row of SHAPES, with bias; emb and residual come with every second and third seed."""
    batch, height, width, c1, c2, n, kernel, stride, padding, upsample = shape
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *sizes: torch.randn(sizes, generator=generator)
    x, x2 = ((size * normal(batch, height, width, c)).to(device, dtype) for c in (c1, c2))
    channels = [c1, c2] if c2 else [c1]
    weight = normal(n, c1 + c2, kernel, kernel).to(weights) / (c1 + c2) ** 0.5
    weight = pack_conv(weight, channels, layout).to(device)
    shape = output_shape(x, n, kernel, stride, padding, upsample)
    emb = normal(batch, 3 * n).to(device)[:, n : 2 * n] if seed % 2 else None
    residual = normal(*shape).to(device, dtype) if seed % 3 else None
    bias = normal(n).to(device)
    return x, x2 if c2 else None, weight, n, kernel, stride, list(padding), upsample, bias, emb, residual, dtype


def make_int8_call(
    shape, dtype=torch.float32, out=torch.float32, static=False, seed=0, device="cpu", layout="panels"
) -> tuple:
    """Arguments of conv2d_w8a8 for a row of SHAPES; int8 `dtype` or `static` come with scales."""
    floats = make_call(shape, torch.float32, torch.float32, seed, device)
    x, x2, _, n, kernel, stride, padding, upsample, bias, emb, residual, _ = floats
    generator = torch.Generator().manual_seed(1000 + seed)
    channels = [x.shape[3]] if x2 is None else [x.shape[3], x2.shape[3]]
    codes = torch.randint(-127, 128, (n, sum(channels), kernel, kernel), generator=generator, dtype=torch.int8)
    scale = (0.01 * (1 + torch.rand(n, generator=generator)) / sum(channels) ** 0.5).to(device)
    images = []
    for image in (x, x2):
        known = image is not None and (static or dtype == torch.int8)
        rows = shape[0] if known and seed % 2 and shape[0] else 1
        scales = (torch.rand(rows, generator=generator) / 40 + 0.01).to(device) if known else None
        if dtype == torch.int8 and image is not None:
            image = (image * 40).round().clamp(-127, 127)
        images += [None if image is None else image.to(dtype), scales]
    out_scale = torch.tensor([0.05], device=device) if out == torch.int8 else None
    packed = pack_conv(codes, channels, layout).to(device), scale, conv_weight_sums(codes, channels).to(device)
    return *images, *packed, n, kernel, stride, padding, upsample, bias, emb, residual, out_scale, out
