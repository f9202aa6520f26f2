"""Images as rows of patches, and back; and what tells a patch where it is."""

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.lowered import output_class, require

Tensor = torch.Tensor
_TABLES = 16  # shapes whose tables are kept


def patchify(image: Tensor, p: int) -> Tensor:
    """`[B, C, H, W]` to `[B, H W / p^2, C p p]` float32: the rows that a convolution with stride p multiplies."""
    B, C, H, W = image.shape
    patches = image.unflatten(3, (W // p, p)).unflatten(2, (H // p, p)).permute(0, 2, 4, 1, 3, 5)  # [B, h, w, C, p, p]
    return ops.copy(patches, torch.float32).view(B, H * W // p**2, C * p * p)


def unpatchify(tokens: Tensor, p: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`[B, N, p p C]` to `[B, C, H, W]` of this size."""
    h, w = size[0] // p, size[1] // p
    patches = tokens.unflatten(2, (p, p, -1)).unflatten(1, (h, w)).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    return ops.copy(patches, dtype).flatten(4, 5).flatten(2, 3)


class Positions:
    """What a `PatchEmbed` adds to its patches: the middle of a large table, or a table for its own size, made for others."""

    def __init__(self, embed: nn.Module) -> None:
        require(getattr(embed, "norm", None) is None, "the patch embedding has a norm")
        self._embed = embed
        self._tables: dict[tuple[int, ...], Tensor] = {}

    def table(self, batch: int, h: int, w: int) -> Tensor | None:
        """`[B, h w, C]` float32, or None where there are no positions. What `prepare` made lasts as long as it is used."""
        return self._tables.get((batch, h, w))

    def prepare(self, batch: int, h: int, w: int) -> None:
        """Makes the table for a batch of h x w patches."""
        if self._embed.pos_embed is None or (batch, h, w) in self._tables:
            return
        if len(self._tables) >= _TABLES:
            self._tables.clear()  # programs keep those that they read
        self._tables[batch, h, w] = self._computed(h, w).detach().float().expand(batch, -1, -1).contiguous()

    def _computed(self, h: int, w: int) -> Tensor:
        embed = self._embed
        if embed.pos_embed_max_size:
            return embed.cropped_pos_embed(h * embed.patch_size, w * embed.patch_size)
        if (embed.height, embed.width) == (h, w):
            return embed.pos_embed
        compute = output_class(embed, "get_2d_sincos_pos_embed")
        spacing = dict(base_size=embed.base_size, interpolation_scale=embed.interpolation_scale)
        return compute(embed_dim=embed.pos_embed.shape[-1], grid_size=(h, w), **spacing, output_type="pt")[None]
