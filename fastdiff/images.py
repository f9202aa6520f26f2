"""Pictures: a grid of samples, and PNG files that say how they were made."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch


def grid(images: torch.Tensor, columns: int | None = None, padding: int = 2) -> np.ndarray:
    """Arranges images in a grid.

    images   [B, 1 or 3, H, W] float in [-1, 1]; values outside are clipped
    columns  images per line; about the square root of twice B when None
    out      [height, width] or [height, width, 3] uint8
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(f"grid: images must be [B >= 1, 1 or 3, H, W], got {list(images.shape)}")
    B, C, H, W = images.shape
    columns = columns or min(B, math.ceil(math.sqrt(2 * B)))
    lines = math.ceil(B / columns)
    sheet = np.full((C, lines * (H + padding) + padding, columns * (W + padding) + padding), 255, dtype=np.uint8)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    for b in range(B):
        top, left = (n * (size + padding) + padding for n, size in ((b // columns, H), (b % columns, W)))
        sheet[:, top : top + H, left : left + W] = pixels[b]
    return sheet[0] if C == 1 else sheet.transpose(1, 2, 0)


def save_png(path: Path, sheet: np.ndarray, metadata: Mapping[str, str]) -> None:
    """Writes a PNG whole or not at all, with text metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for key, value in metadata.items():
        texts.add_text(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    try:
        Image.fromarray(sheet).save(partial, format="PNG", pnginfo=texts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
