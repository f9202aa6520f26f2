"""How far two tensors or two sets of pictures are apart."""

import math

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


_CHUNK = 1 << 18  # elements that stay in the cache


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Signal-to-noise ratio 10 log10(sum x^2 / sum (x - y)^2) of y against x in dB, sums in float64; inf when equal."""
    return ratio_db(*energies(x, y))


def energies(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Sums of x^2 and of (x - y)^2 in float64, differences in the wider of both dtypes."""
    signal = noise = 0.0
    for a, b in zip(x.detach().flatten().split(_CHUNK), y.detach().flatten().split(_CHUNK), strict=True):
        signal += float(a.square().sum(dtype=torch.float64))
        noise += float((a - b).square().sum(dtype=torch.float64))
    return signal, noise


def ratio_db(signal: float, noise: float) -> float:
    """10 log10 of the ratio; inf without noise, -inf without signal."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as they are stored: float64 whole numbers 0..255."""
    return ((images.double().clamp(-1, 1) + 1) * 127.5).round()


def psnr_db(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [-1, 1] at 8 bits, [B] float64; inf when equal.

    a, b  [B, C, H, W]
    """
    error = (to_bytes(a) - to_bytes(b)).square().flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images in [-1, 1], [B] float64, window 11 with deviation 1.5.

    a, b  [B, C, H, W], at least 11 by 11
    """
    a, b = to_bytes(a), to_bytes(b)
    C = a.shape[1]
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line[None, :] / line.sum() ** 2).expand(C, 1, 11, 11).to(a.device)
    blur = lambda x: F.conv2d(x, window, groups=C)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)
