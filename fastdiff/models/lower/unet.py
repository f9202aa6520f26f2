"""UNets: diffusers' `UNet2DModel` (Ho et al. 2020) and `UNet2DConditionModel` (Rombach et al. 2022), and the bundled one."""

import inspect
from collections.abc import Callable

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.layers import Packer
from fastdiff.models.lower.lowered import Call, only_defaults, require, rows_of_time
from fastdiff.models.lower.structure import Structure
from fastdiff.models.lower.unet_blocks import Assembly, Conditions, is_silu, pack_conv, pack_norm
from fastdiff.models.lower.unet_levels import Level, can_crop, pack_levels
from fastdiff.models.lower.unet_time import UNetTime
from fastdiff.temporal import TemporalTable

Tensor = torch.Tensor
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# their weights in bfloat16 cost 15 dB of a 20-step sampling of the bundled model: a bias that is the same at each step
_FIRST = "first layer: few input channels, and its error reaches everything"
_LAST = "last layer: few output channels, and its error reaches the image"


class LoweredUNet:
    """A UNet in packed weights, channels-last throughout; skip connections are second segments, never concatenated.

    Time projections are rows of the temporal table; keys and values of cross-attention are computed once per context.
    """

    adds = False

    def __init__(self, module: nn.Module, packer: Packer, exact_time: bool) -> None:
        self.record = packer.record
        self._module = module
        self._structure = Structure(module)
        assembly = Assembly(packer)
        self._first = pack_conv(packer, "conv_in", module.conv_in, precise=_FIRST)
        self._down, self._mid, self._up = pack_levels(assembly, module)
        self._crops = can_crop(module, self._down)
        self._norm = pack_norm(packer, "conv_norm_out", module.conv_norm_out, torch.float32)
        self._last = pack_conv(packer, "conv_out", module.conv_out, precise=_LAST)
        context = getattr(module, "encoder_hid_proj", None)
        self._context = None if context is None else packer.linear("encoder_hid_proj", context, spare="runs once")
        self._cross = assembly.cross
        self._context_width = assembly.context_width if context is None else context.in_features
        self._time = UNetTime(module, assembly.resnets)
        self.temporal = TemporalTable(self._time, exact=exact_time)
        packer.record.add("time_embedding, *.time_emb_proj", "temporal table", "depends on the timestep only")

    def read(self, *args, **kwargs) -> Call:
        """Takes the arguments of the module's forward apart; raises UnsupportedError for those that it does not know."""
        self._structure.check()
        require(not any(map(_uses_freeu, self._module.up_blocks)), "FreeU is on")
        return _READERS[type(self._module).__name__](self, *args, **kwargs)

    def _read_bundled(self, x: Tensor, t: Tensor | float) -> Call:
        return self._call(x, rows_of_time(t, x.shape[0]), {}, None, lambda out: out)

    def _read_plain(
        self, sample: Tensor, timestep, class_labels: Tensor | None = None, return_dict: bool = True, **others
    ) -> Call:
        only_defaults(**others)
        # diffusers makes an integer of a Python number here
        t = timestep if isinstance(timestep, Tensor) else int(timestep)
        time = rows_of_time(t, sample.shape[0])
        return self._call(sample, time, {"class_labels": class_labels}, None, self._wrap("UNet2DOutput", return_dict))

    def _read_conditional(
        self,
        sample: Tensor,
        timestep,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        added_cond_kwargs: dict | None = None,
        *residuals: object,
        return_dict: bool = True,
        **others,
    ) -> Call:
        only_defaults(attention_mask=attention_mask, cross_attention_kwargs=cross_attention_kwargs, **others)
        require(not residuals, "residuals of a ControlNet or an adapter are not lowered")
        rows = sample.shape[0]
        added = added_cond_kwargs or {}
        given = {"class_labels": class_labels, "timestep_cond": timestep_cond}
        given |= {name: added.get(name) for name in ("text_embeds", "time_ids")}
        wrap = self._wrap("UNet2DConditionOutput", return_dict)
        return self._call(sample, rows_of_time(timestep, rows), given, encoder_hidden_states, wrap)

    def _call(self, sample: Tensor, time: Tensor, given: dict, context: Tensor | None, wrap: Callable) -> Call:
        require(sample.dim() == 4 and sample.shape[1] == self._module.conv_in.in_channels, "sample has another shape")
        require(sample.dtype in _FLOATS, f"sample is {sample.dtype}")
        factor = 2 ** sum(level.resample is not None for level in self._down)
        halves = sample.shape[2] % factor == sample.shape[3] % factor == 0
        require(halves or self._crops, f"sizes are not multiples of {factor}")
        if not self._cross:
            return Call(sample, (time, *self._time.inputs(sample.shape[0], given)), (), wrap)
        fits = isinstance(context, Tensor) and context.dim() == 3 and context.dtype in _FLOATS
        fits = fits and context.shape[0] == sample.shape[0] and context.shape[2] == self._context_width
        require(fits, f"encoder_hidden_states: a tensor [B, M, {self._context_width}] is needed")
        return Call(sample, (time, *self._time.inputs(sample.shape[0], given)), (context,), wrap)

    def _wrap(self, name: str, return_dict: bool) -> Callable[[Tensor], object]:
        if not return_dict:
            return lambda out: (out,)
        output = inspect.unwrap(type(self._module).forward).__globals__[name]
        return lambda out: output(sample=out)

    def prepare(self, call: Call) -> None:
        """Nothing depends on the shapes."""

    def encode(self, *context: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of every cross-attention."""
        if self._context is not None:
            context = (self._context(context[0]),)
        return tuple(project(context[0]) for project in self._cross)

    def body(self, sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor:
        """`[B, C, H, W]`, the time projections and the encoded context to `[B, C', H, W]` in the sample's dtype."""
        head = self.head(sample, rows, *encoded)
        return self.tail(self.middle(head, rows, *encoded), head, sample, rows, *encoded)

    def head(self, sample: Tensor, rows: Tensor, *encoded: Tensor) -> tuple[Tensor, ...]:
        """What the first level hands down, then the skip connections so far."""
        x = self._first(ops.copy(sample.permute(0, 2, 3, 1), torch.float32))
        skips = [x]
        return (_go_down(self._down[0], x, skips, Conditions(rows, encoded)), *skips)

    def middle(self, head: tuple[Tensor, ...], rows: Tensor, *encoded: Tensor) -> Tensor:
        """All levels but the first on the way down and the last on the way up."""
        conditions = Conditions(rows, encoded)
        x, *skips = head
        for level in self._down[1:]:
            x = _go_down(level, x, skips, conditions)
        for stage in self._mid.stages:
            x = stage(x, None, conditions)
        for level in self._up[:-1]:
            x = _go_up(level, x, skips, conditions)
        return x

    def tail(self, x: Tensor, head: tuple[Tensor, ...], sample: Tensor, rows: Tensor, *encoded: Tensor) -> Tensor:
        """The last level and the prediction."""
        last = self._up[-1]
        x = _go_up(last, x, [*head[1 : 1 + len(last.stages)]], Conditions(rows, encoded))
        out = self._last(self._norm(x, None, "silu"), out_dtype=torch.float32)
        return ops.copy(out.permute(0, 3, 1, 2), sample.dtype)


def _go_down(level: Level, x: Tensor, skips: list[Tensor], conditions: Conditions) -> Tensor:
    """Runs a level and its reduction, each of whose results is a skip connection too."""
    for stage in level.stages:
        x = stage(x, None, conditions)
        skips.append(x)
    if level.resample is not None:
        x = level.resample(x)
        skips.append(x)
    return x


def _go_up(level: Level, x: Tensor, skips: list[Tensor], conditions: Conditions) -> Tensor:
    """Runs a level on the skip connections that were made last, then its enlargement."""
    for stage in level.stages:
        x = stage(x, skips.pop(), conditions)
    return x if level.resample is None else level.resample(x, skips[-1].shape[1:3])


_READERS = {
    "UNet": LoweredUNet._read_bundled,
    "UNet2DModel": LoweredUNet._read_plain,
    "UNet2DConditionModel": LoweredUNet._read_conditional,
}


def lower_unet(module: nn.Module, packer: Packer, exact_time: bool) -> LoweredUNet:
    """Packs a UNet. Raises UnsupportedError where it differs from the published architectures."""
    config = module.config
    require(not getattr(config, "center_input_sample", False), "center_input_sample is not lowered")
    scaled = type(module).__name__ == "UNet2DModel" and config.time_embedding_type == "fourier"
    require(not scaled, "a result divided by the timestep is not lowered")
    require(
        module.conv_norm_out is not None and is_silu(getattr(module, "conv_act", None)), "no norm and SiLU at the end"
    )
    projection = getattr(config, "encoder_hid_dim_type", None)
    require(projection in (None, "text_proj"), f"encoder_hid_dim_type {projection} is not lowered")
    return LoweredUNet(module, packer, exact_time)


def _uses_freeu(block: nn.Module) -> bool:
    return all(block.__dict__.get(name) for name in ("s1", "s2", "b1", "b2"))
