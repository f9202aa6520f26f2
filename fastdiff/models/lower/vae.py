"""The two halves of diffusers' `AutoencoderKL` (Rombach et al. 2022), each a module of its own: `Decoder` and `Encoder`."""

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.context import FLOATS
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.trunk import FIRST, LAST
from fastdiff.models.lower.unet_blocks import Assembly, Conditions, is_silu, pack_conv, pack_norm
from fastdiff.models.lower.unet_levels import pack_level
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor


class LoweredCoder:
    """Half of an autoencoder in packed weights, channels-last throughout. Nothing in it depends on a time."""

    def __init__(self, module: nn.Module, packer: Packer, kind: str) -> None:
        self.record = packer.record
        self._structure, self._channels = Structure(module), module.conv_in.in_channels
        self._first = pack_conv(packer, "conv_in", module.conv_in, precise=FIRST)
        self._factor = 1
        assembly = Assembly(packer)
        blocks = [(kind, f"{kind}_blocks.{i}", block) for i, block in enumerate(getattr(module, f"{kind}_blocks"))]
        middle = [("mid", "mid_block", module.mid_block)]
        ordered = blocks + middle if kind == "down" else middle + blocks
        self._levels = [pack_level(assembly, *level) for level in ordered]
        require(not assembly.resnets, "residual blocks depend on a time")
        if kind == "down":
            self._factor = 2 ** sum(level.resample is not None for level in self._levels)
        self._norm = pack_norm(packer, "conv_norm_out", module.conv_norm_out, torch.float32)
        self._last = pack_conv(packer, "conv_out", module.conv_out, precise=LAST)
        self._kind = kind
        self.temporal = TemporalTable(lambda rows: rows.new_empty(len(rows), 0))

    def read(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Call:
        """The arguments of diffusers' forward."""
        self._structure.check()
        only_defaults(latent_embeds=latent_embeds)
        fits = sample.dim() == 4 and sample.shape[1] == self._channels
        require(fits, f"sample: [B, {self._channels}, H, W] is needed")
        require(sample.dtype in FLOATS, f"sample is {sample.dtype}")
        require(not any(n % self._factor for n in sample.shape[2:]), f"sizes are not multiples of {self._factor}")
        return Call(sample, (sample.new_zeros(sample.shape[0], dtype=torch.float32),), (), lambda out: out)

    def prepare(self, call: Call) -> None:
        """Nothing depends on the shapes."""

    def encode(self) -> tuple[Tensor, ...]:
        """There is no context."""
        return ()

    def body(self, sample: Tensor, rows: Tensor) -> Tensor:
        """`[B, C, H, W]` to the image or to the moments of latents, `[B, C', H', W']` in the sample's dtype."""
        conditions = Conditions(rows, ())
        x = self._first(ops.copy(sample.permute(0, 2, 3, 1), torch.float32))
        for level in self._levels:
            for stage in level.stages:
                x = stage(x, None, conditions)
            if level.resample is not None:
                x = level.resample(x) if self._kind == "down" else level.resample(x, (2 * x.shape[1], 2 * x.shape[2]))
        out = self._last(self._norm(x, None, "silu"), out_dtype=torch.float32)
        return ops.copy(out.permute(0, 3, 1, 2), sample.dtype)


def lower_decoder(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredCoder:
    """Packs a decoder. Raises UnsupportedError for one of another autoencoder."""
    _check(module, "up_blocks")
    return LoweredCoder(module, packer, "up")


def lower_encoder(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredCoder:
    """Packs an encoder. Raises UnsupportedError for one of another autoencoder."""
    _check(module, "down_blocks")
    return LoweredCoder(module, packer, "down")


def _check(module: nn.Module, blocks: str) -> None:
    """Other autoencoders have classes of the same names."""
    for part in ("conv_in", blocks, "mid_block", "conv_norm_out", "conv_out"):
        require(getattr(module, part, None) is not None, f"it has no {part}: not a part of an AutoencoderKL")
    require(is_silu(getattr(module, "conv_act", None)), "conv_act is not SiLU")
