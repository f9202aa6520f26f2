"""What transformers with a context share: their blocks in a row, the modulations of all of them, and their parts."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.context import Caption
from fastdiff.models.lower.context_block import ContextBlock, Surroundings
from fastdiff.models.lower.heads import TokenNorm
from fastdiff.models.lower.lowered import output_class, require, rows_of_time

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

    def run(self, blocks: range, x: Tensor, rows: Tensor, encoded: tuple[Tensor, ...], around: Surroundings) -> Tensor:
        """`[B, N, C]` tokens through some of the blocks, with the rows of `modulations` and what `encode` gave."""
        for i in blocks:
            x = self.blocks[i](x, _parts(rows, 6 * i, 6, x.shape[2]), *encoded[2 * i : 2 * i + 2], around)
        return x

    def finish(self, x: Tensor, rows: Tensor) -> Tensor:
        """Tokens for the last layer."""
        parts = _parts(rows, 6 * len(self.blocks), 2, x.shape[2])
        return ops.norm_modulate(x, "layer", None, None, self.final_eps, *parts, torch.float32)


def _parts(rows: Tensor, first: int, count: int, width: int) -> list[Tensor]:
    """Views of `count` modulations in the temporal rows."""
    return [rows[:, i * width : (i + 1) * width] for i in range(first, first + count)]


class ContextModel(ABC):
    """A lowered transformer with a context, made of a trunk and of what the family adds: how tokens enter and leave.

    Its context is the text and then whatever the blocks take as it is, a mask and a rotation.
    """

    adds = True
    _trunk: Trunk

    @abstractmethod
    def _enter(self, sample: Tensor) -> Tensor:
        """The sample as float32 tokens `[B, *grid, C]`."""

    @abstractmethod
    def _leave(self, x: Tensor, sample: Tensor) -> Tensor:
        """Normed tokens `[B, N, C]` to the prediction, in the sample's dtype."""

    @abstractmethod
    def _around(self, grid: tuple[int, ...], given: tuple[Tensor, ...]) -> Surroundings:
        """What blocks take besides their tokens, from the grid and the context after the text."""

    def encode(self, text: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of every block, and the rest of the context as it is."""
        return (*self._trunk.encode(text), *given)

    def body(self, sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor:
        """The sample, the rows of `modulations` and the encoded context to the prediction, in the sample's dtype."""
        head = self.head(sample, rows, *encoded)
        return self.tail(self.middle(head, rows, *encoded), head, sample, rows, *encoded)

    def head(self, sample: Tensor, rows: Tensor, *encoded: Tensor) -> tuple[Tensor, ...]:
        """The tokens `[B, *grid, C]` after the first block."""
        return (self._run(range(1), self._enter(sample), rows, encoded),)

    def middle(self, head: tuple[Tensor, ...], rows: Tensor, *encoded: Tensor) -> Tensor:
        """All blocks but the first."""
        return self._run(range(1, len(self._trunk.blocks)), head[0], rows, encoded)

    def tail(self, x: Tensor, head: tuple[Tensor, ...], sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor:
        """From the tokens to the prediction."""
        return self._leave(self._trunk.finish(x.flatten(1, -2), rows), sample)

    def _run(self, blocks: range, x: Tensor, rows: Tensor, encoded: tuple[Tensor, ...]) -> Tensor:
        around = self._around(x.shape[1:-1], encoded[2 * len(self._trunk.blocks) :])
        return self._trunk.run(blocks, x.flatten(1, -2), rows, encoded, around).view(x.shape)


def modulations(blocks: nn.ModuleList, final: nn.Module, six: Tensor, embedded: Tensor) -> Tensor:
    """Shift, scale and gate of both halves of every block, then shift and scale of the output, for R rows.

    six       `[R, 6 C]`, which each block adds a table of its own to
    embedded  `[R, C]`, which the output adds its table to
    """
    table = lambda module: module.scale_shift_table.detach().flatten()
    six, two = six.float(), embedded.float().repeat(1, 2)
    return torch.cat([*(six + table(block) for block in blocks), two + table(final)], dim=1)


def time_of_rows(timestep: Tensor | float, rows: int) -> Tensor:
    """Timesteps as `[rows]`; one for each token `[rows, N]` will do where those of a row are the same."""
    if isinstance(timestep, Tensor) and timestep.dim() == 2 and timestep.shape[0] == rows:
        require(bool((timestep == timestep[:, :1]).all()), "tokens of one sample have different timesteps")
        timestep = timestep[:, 0]
    return rows_of_time(timestep, rows)


def wrap_output(module: nn.Module, return_dict: bool) -> Callable[[Tensor], object]:
    """Makes diffusers' return value of a result."""
    if not return_dict:
        return lambda out: (out,)
    return lambda out: output_class(module, "Transformer2DModelOutput")(sample=out)
