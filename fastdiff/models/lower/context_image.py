"""Transformers with a context over the patches of an image: how the image enters and leaves."""

import torch
from torch import nn

from fastdiff.models.lower.context import FLOATS
from fastdiff.models.lower.context_block import Surroundings
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, require
from fastdiff.models.lower.patches import Positions, patchify, unpatchify
from fastdiff.models.lower.trunk import FIRST, LAST, ContextModel

Tensor = torch.Tensor


class ImageModel(ContextModel):
    """A lowered transformer with a context that a `PatchEmbed` stands before.

    embed  name of the patch embedding in the module
    """

    def __init__(self, module: nn.Module, packer: Packer, embed: str) -> None:
        layer = getattr(module, embed)
        self._patch, self._channels = layer.patch_size, layer.proj.in_channels
        self._positions = Positions(layer)
        self._embed = packer.linear(f"{embed}.proj", layer.proj, precise=FIRST)
        self._final = packer.linear("proj_out", module.proj_out, precise=LAST)

    def _check(self, sample: Tensor) -> None:
        """Raises UnsupportedError for an image that the module would not take, or would cut."""
        fits = sample.dim() == 4 and sample.shape[1] == self._channels
        require(fits, f"sample: [B, {self._channels}, H, W] is needed")
        require(sample.dtype in FLOATS, f"sample is {sample.dtype}")
        require(all(n % self._patch == 0 for n in sample.shape[2:]), f"sizes are not multiples of {self._patch}")

    def prepare(self, call: Call) -> None:
        """Makes the positions of the patches."""
        self._positions.prepare(call.sample.shape[0], *self._grid(call.sample))

    def _enter(self, sample: Tensor) -> Tensor:
        grid = self._grid(sample)
        positions = self._positions.table(sample.shape[0], *grid)
        x = self._embed(patchify(sample, self._patch), residual=positions, out_dtype=torch.float32)
        return x.unflatten(1, grid)

    def _leave(self, x: Tensor, sample: Tensor) -> Tensor:
        return unpatchify(self._final(x, out_dtype=torch.float32), self._patch, sample.shape[2:], sample.dtype)

    def _around(self, grid: tuple[int, ...], given: tuple[Tensor, ...]) -> Surroundings:
        return Surroundings(grid, *given)

    def _grid(self, sample: Tensor) -> tuple[int, int]:
        return sample.shape[2] // self._patch, sample.shape[3] // self._patch
