"""Distances of pictures that need a network: LPIPS where the package is installed, Frechet distance by any feature net."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

Tensor = torch.Tensor

_SMALLEST = 64  # side in pixels below which AlexNet's last layers see nothing


def lpips_distance() -> Callable[[Tensor, Tensor], float] | None:
    """A function of two sets of pictures in [-1, 1], [B, C, H, W]: their mean LPIPS (Zhang et al. 2018, AlexNet).

    None where the package `lpips` or its weights are not there. Pictures under 64 pixels are repeated to that size.
    """
    try:
        import lpips

        net = lpips.LPIPS(net="alex", verbose=False).eval()
    except (ImportError, OSError):
        return None

    def distance(a: Tensor, b: Tensor) -> float:
        with torch.no_grad():
            return float(net(*(_as_rgb(x.float()) for x in (a, b))).mean())

    return distance


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Frechet distance between the Gaussians of two feature sets (Heusel et al. 2017, eq. 6).

    a, b  [N, D] and [M, D], at least two rows each; computed in float64
    """
    if min(len(a), len(b)) < 2 or a.ndim != 2 or a.shape[1:] != b.shape[1:]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"frechet_distance: [N, D] and [M, D] with two rows or more expected, got {shapes}")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = _sqrt(cov_a)
    # the trace of sqrt(cov_a cov_b), from the symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _as_rgb(images: Tensor) -> Tensor:
    times = -(-_SMALLEST // min(images.shape[-2:]))
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (
        images.clamp(-1, 1) if times == 1 else F.interpolate(images.clamp(-1, 1), scale_factor=times, mode="nearest")
    )
