"""Context that stays the same over a sampling: text, which of its tokens count, and what is computed of it once."""

from dataclasses import dataclass

import torch
from torch import nn

from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.lowered import require

Tensor = torch.Tensor
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ONCE = "runs once for each context, not at each step"
_DISCARD = -10000.0  # what diffusers adds to the scores of a token that does not count
_ROUND = 32  # tokens: so that prompts of about the same length share a program


@dataclass(frozen=True)
class Caption:
    """Two linear layers around GELU, from the width of a text encoder to the model's."""

    first: PackedLinear
    second: PackedLinear
    activation: str

    def __call__(self, text: Tensor) -> Tensor:
        return self.second(self.first(text, activation=self.activation))


def pack_caption(packer: Packer, name: str, projection: nn.Module) -> Caption:
    """Packs a `PixArtAlphaTextProjection`."""
    kind = type(projection.act_1).__name__
    require(kind in ("GELU", "SiLU"), f"{name} has the activation {kind}")
    gelu = {"tanh": "gelu_tanh", "none": "gelu"}.get(getattr(projection.act_1, "approximate", ""), "silu")
    first = packer.linear(f"{name}.linear_1", projection.linear_1, spare=ONCE)
    return Caption(first, packer.linear(f"{name}.linear_2", projection.linear_2, spare=ONCE), gelu)


def read_text(text: Tensor, mask: Tensor | None, rows: int, width: int) -> tuple[Tensor, ...]:
    """The text `[B, M, width]` and, where there is a mask, what it adds to scores `[B, 1, M]`.

    mask  `[B, M]`, 1 where a token counts, or `[B, 1, M]`, which is added to the scores

    Tokens at the end that count in no row are left out: their weights would be 0.
    """
    fits = isinstance(text, Tensor) and text.dim() == 3 and text.dtype in FLOATS
    require(
        fits and text.shape[0] == rows and text.shape[2] == width, f"text: a tensor [{rows}, M, {width}] is needed"
    )
    if mask is None:
        return (text,)
    shapes = (rows, text.shape[1]), (rows, 1, text.shape[1])
    require(isinstance(mask, Tensor) and mask.shape in shapes, "mask of the text: [B, M] or [B, 1, M] is needed")
    bias = (1 - mask.float())[:, None] * _DISCARD if mask.dim() == 2 else mask.float()
    kept = _kept(bias)
    return text[:, :kept], bias[..., :kept]


def _kept(bias: Tensor) -> int:
    """Tokens up to the last that counts in some row; all of them where a row has none that counts."""
    counts = bias[:, 0] > _DISCARD / 2
    total = counts.shape[1]
    if not counts.any(1).all():
        return total
    last = int(counts.any(0).nonzero()[-1]) + 1
    return min(-(-last // _ROUND) * _ROUND, total)


def read_pooled(pooled: Tensor | None, rows: int) -> Tensor:
    """A vector of text for each row, `[rows, width]`."""
    fits = isinstance(pooled, Tensor) and pooled.dim() == 2 and pooled.shape[0] == rows
    require(fits, f"pooled text: a tensor [{rows}, width] is needed")
    return pooled
