"""Recipes: data over the shared parts. A recipe is a configuration and the calibration set that it wants."""

from dataclasses import dataclass, replace
from typing import Any

from fastdiff.quant.config import QuantConfig
from fastdiff.quant.schemes import LowRank, Rotate, Rounding, Scheme, Smooth, TensorSpec

# layers at the edge of a network: few channels, and their error reaches everything (section 7.4)
SPARED = (
    r"^conv_in$",
    r"^conv_out$",
    r"(?:^|\.)(?:pos_embed|x_embedder|patch_embed|context_embedder|img_in|txt_in)(?:\.|$)",
    r"^(?:proj_out|proj_out_2|final_layer\..*)$",
    r"encoder_hid_proj|class_embed|caption_projection",
)
# kept at 8 bits where the rest has 4: shortcuts, changes of resolution, the feed-forward's second half
_WIDE = r"conv_shortcut|downsamplers|upsamplers|proj_in$|proj_out$|\.ff\.net\.2$|ff_context\.net\.2$"


@dataclass(frozen=True)
class Calibration:
    """Which states of the network's own trajectories a recipe looks at.

    kind      a key of `calibration.SETS`: `all_steps`, `ndtc`, `one_time`
    samples   trajectories;  solver, steps  how they are drawn
    options   of the set, as `every`, `std` or `t`
    """

    kind: str = "all_steps"
    samples: int = 64
    solver: str = "ddim"
    steps: int = 20
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize a network."""

    name: str
    config: QuantConfig
    calibration: Calibration | None = None
    summary: str = ""

    def with_iterations(self, iters: int) -> "Recipe":
        """The same with another number of steps per block of learned rounding."""
        short = lambda s: s if s is None else replace(s, rounding=replace(s.rounding, iters=iters))
        overrides = tuple((pattern, short(scheme)) for pattern, scheme in self.config.overrides)
        return replace(self, config=replace(self.config, default=short(self.config.default), overrides=overrides))


def _group(dtype: str, size: int, **more: Any) -> TensorSpec:
    return TensorSpec(dtype, "group", size, **more)


INT8, TOKEN = TensorSpec("int8"), TensorSpec("int8", "token", dynamic=True)
_PER_STEP = TensorSpec("int8", "tensor", per_step=True)
_Q4_0 = _group("int4", 64, range="signed")
_W8A8 = Scheme(INT8, TOKEN, (Rotate(256),))


def _spared(default: Scheme, wide: Scheme | None = None, **more: Any) -> QuantConfig:
    return QuantConfig(default, () if wide is None else ((_WIDE, wide),), SPARED, **more)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("w8a8", _spared(_W8A8), None, "int8, rotated, ranges of activations at run time"),
        Recipe(
            "w8a8-static",
            _spared(Scheme(INT8, _PER_STEP)),
            Calibration(),
            "int8, one range of activations per step",
        ),
        Recipe("w8a16", _spared(Scheme(INT8)), None, "int8 weights only"),
        Recipe("w4a16", _spared(Scheme(_Q4_0), Scheme(INT8)), None, "int4 weights in groups of 64 only"),
        Recipe("w4a8", _spared(Scheme(_group("int4", 128), TOKEN, (Rotate(256),)), _W8A8), None, "int4 weights, rotated"),
        Recipe(
            "w4a8-svd",
            _spared(Scheme(_group("int4", 64), TOKEN, (Smooth(None), LowRank(32))), _W8A8),
            Calibration(samples=16, options=(("every", 4),)),
            "int4 weights, smoothed, with a low-rank branch of rank 32",
        ),
        Recipe(
            "w4a4-svd",
            _spared(
                Scheme(
                    _group("int4", 64),
                    _group("int4", 64, dynamic=True),
                    (Smooth(None), LowRank(32)),
                    Rounding("gptq"),
                ),
                _W8A8,
            ),
            Calibration(samples=16, options=(("every", 4),)),
            "int4 weights and activations with a low-rank branch and GPTQ (SVDQuant)",
        ),
        Recipe(
            "fp8",
            _spared(Scheme(TensorSpec("fp8_e4m3"), TensorSpec("fp8_e4m3", "token", dynamic=True))),
            None,
            "float8 e4m3 weights and activations",
        ),
    )
}  # fmt: skip


def recipe_of(name: "str | Recipe | QuantConfig") -> Recipe:
    """The recipe of this name; a Recipe or a QuantConfig is taken as it is."""
    if isinstance(name, Recipe):
        return name
    if isinstance(name, QuantConfig):
        return Recipe("own settings", name, Calibration() if _needs_data(name) else None)
    if name not in RECIPES:
        raise ValueError(f"quantize: unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]


def _needs_data(config: QuantConfig) -> bool:
    return any(s is not None and s.needs_data for s in (config.default, *(s for _, s in config.overrides)))
