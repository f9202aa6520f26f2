"""What transformers with a context share: their blocks in a row, the modulations of all of them, and their results."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.context import Caption
from fastdiff.models.lower.context_block import ContextBlock, Surroundings
from fastdiff.models.lower.heads import TokenNorm
from fastdiff.models.lower.lowered import output_class

Tensor = torch.Tensor
FIRST = "first layer: few input channels, and its error reaches everything"
LAST = "last layer: few output channels, and its error reaches the image"


@dataclass(frozen=True)
class Trunk:
    """Blocks with a caption before them and a norm behind, over a stream of tokens in float32."""

    caption: Caption | None
    caption_norm: TokenNorm | None
    blocks: tuple[ContextBlock, ...]
    final_eps: float

    def encode(self, text: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of every block, one after another."""
        context = text if self.caption is None else self.caption(text)
        context = context if self.caption_norm is None else self.caption_norm.plain(context)
        return tuple(part for block in self.blocks for part in block.cross.encode(context))

    def __call__(self, x: Tensor, rows: Tensor, encoded: tuple[Tensor, ...], around: Surroundings) -> Tensor:
        """`[B, N, C]` tokens, the rows of `modulations` and what `encode` gave to tokens for the last layer."""
        width = x.shape[2]
        part = lambda i: rows[:, i * width : (i + 1) * width]
        for i, block in enumerate(self.blocks):
            x = block(x, [part(6 * i + j) for j in range(6)], *encoded[2 * i : 2 * i + 2], around)
        i = 6 * len(self.blocks)
        return ops.norm_modulate(x, "layer", None, None, self.final_eps, part(i), part(i + 1), torch.float32)


def modulations(blocks: nn.ModuleList, final: nn.Module, six: Tensor, embedded: Tensor) -> Tensor:
    """Shift, scale and gate of both halves of every block, then shift and scale of the output, for R rows.

    six       `[R, 6 C]`, which each block adds a table of its own to
    embedded  `[R, C]`, which the output adds its table to
    """
    table = lambda module: module.scale_shift_table.detach().flatten()
    six, two = six.float(), embedded.float().repeat(1, 2)
    return torch.cat([*(six + table(block) for block in blocks), two + table(final)], dim=1)


def wrap_output(module: nn.Module, return_dict: bool) -> Callable[[Tensor], object]:
    """Makes diffusers' return value of a result."""
    if not return_dict:
        return lambda out: (out,)
    return lambda out: output_class(module, "Transformer2DModelOutput")(sample=out)


def mask_of(encoded: tuple[Tensor, ...], blocks: int) -> Tensor | None:
    """What is added to the scores of the context, `[B, 1, 1, M]`, where it came with the keys and values."""
    return encoded[2 * blocks][:, None] if len(encoded) > 2 * blocks else None
