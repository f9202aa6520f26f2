"""How far two tensors or two sets of pictures are apart."""

import torch
from torch.nn import functional as F

Tensor = torch.Tensor


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Signal-to-noise ratio 10 log10(sum x^2 / sum (x - y)^2) of y against x in dB, in float64; inf when equal."""
    x, y = x.detach().double(), y.detach().double()
    noise, signal = float((x - y).square().sum()), float(x.square().sum())
    if noise == 0.0:
        return float("inf")
    return 10.0 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64))) if signal else float("-inf")


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
