"""Recipes: data over the shared parts. A recipe is a configuration and the calibration set that it wants."""

from dataclasses import dataclass, replace
from typing import Any

from fastdiff.quant.config import QuantConfig, TemporalPolicy
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
        temporal = replace(self.config.temporal, scheme=short(self.config.temporal.scheme))
        changed = {"default": short(self.config.default), "overrides": overrides, "temporal": temporal}
        return replace(self, config=replace(self.config, **changed))


def _group(dtype: str, size: int, **more: Any) -> TensorSpec:
    return TensorSpec(dtype, "group", size, **more)


INT8, TOKEN = TensorSpec("int8"), TensorSpec("int8", "token", dynamic=True)
# searched, not extreme values: an extreme of one trajectory would widen the range of all
_PER_STEP = TensorSpec("int8", "tensor", per_step=True, range="mse")
_Q4_0 = _group("int4", 64, range="signed")
_W8A8 = Scheme(INT8, TOKEN, (Rotate(256),))


def _spared(default: Scheme, wide: Scheme | None = None, **more: Any) -> QuantConfig:
    return QuantConfig(default, () if wide is None else ((_WIDE, wide),), SPARED, **more)


_GENERAL = (
    Recipe("w8a8", _spared(_W8A8), None, "int8, rotated, ranges of activations at run time"),
    Recipe(
        "w8a8-static",
        # rounding moves the mean of narrow activations, and the first steps multiply a mean error by 1 / alpha
        _spared(Scheme(INT8, _PER_STEP), correct_output=True),
        Calibration(),
        "int8, one range of activations per step, the output corrected per step",
    ),
    Recipe("w8a16", _spared(Scheme(INT8)), None, "int8 weights only"),
    Recipe("w4a16", _spared(Scheme(_Q4_0), Scheme(INT8)), None, "int4 weights in groups of 64 only"),
    Recipe(
        "w4a8",
        _spared(Scheme(_group("int4", 128, range="nested"), TOKEN, (Rotate(256),)), _W8A8),
        None,
        "int4 weights in groups of 128, rotated",
    ),
    Recipe(
        "w4a8-svd",
        _spared(Scheme(_group("int4", 64), TOKEN, (Smooth(None), LowRank(32))), _W8A8),
        Calibration(samples=16, options=(("every", 4),)),
        "int4 weights; linear layers, but no convolutions, are smoothed and have a low-rank branch of rank 32",
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
        "int4 weights and activations with a low-rank branch and GPTQ (SVDQuant); convolutions as in w4a8-svd",
    ),
    Recipe(
        "fp8",
        _spared(Scheme(TensorSpec("fp8_e4m3"), TensorSpec("fp8_e4m3", "token", dynamic=True))),
        None,
        "float8 e4m3 weights and activations",
    ),
)

# PTQ4DM (Shang et al. 2023): normally distributed times, ranges of least L_2.4 error, one range for all steps
_PTQ4DM = Scheme(TensorSpec("int8", range="mse"), TensorSpec("int8", "tensor", range="mse"))
# TFMQ-DM (Huang et al. 2024): learned rounding per block, one asymmetric range of activations per step
_LEARNED = Rounding("adaround")
_U4 = TensorSpec("uint4", symmetric=False, range="mse")
# symmetric: at 8 bits a zero point is worth 0.5 dB (section 3.1), and no kernel multiplies one
_INT8_SEARCHED = TensorSpec("int8", range="mse")
_U8_STEP = TensorSpec("uint8", "tensor", symmetric=False, per_step=True, range="mse")
_U8 = TensorSpec("uint8", "tensor", symmetric=False, range="mse")
# inside the temporal block ranges are the exact bounds of the finite set of times
_U8_FINITE = TensorSpec("uint8", "tensor", symmetric=False, per_step=True)
# what TFMQ-DM leaves in floating point besides the edges
_TFMQ_SPARED = (*SPARED, r"conv_shortcut", r"downsamplers", r"time_embedding\.linear_1$")


def _tfmq(name: str, weight: TensorSpec, step: TensorSpec | None, mode: str = "quantize", summary: str = "") -> Recipe:
    finite = None if step is None else _U8_FINITE
    temporal = TemporalPolicy(mode, Scheme(weight, finite, (), _LEARNED))
    config = QuantConfig(Scheme(weight, step, (), _LEARNED), (), _TFMQ_SPARED, temporal)
    return Recipe(name, config, Calibration(samples=32), summary)


_PAPERS = (
    Recipe(
        "ptq4dm",
        QuantConfig(_PTQ4DM, (), SPARED, TemporalPolicy("off")),
        Calibration("ndtc", 256),
        "PTQ4DM: int8, calibrated on normally distributed times",
    ),
    _tfmq("tfmq", _U4, _U8_STEP, summary="TFMQ-DM: int4 weights, int8 activations, ranges per step"),
    _tfmq("tfmq-w4a32", _U4, None, summary="TFMQ-DM: int4 weights only"),
    _tfmq("tfmq-w8a8", _INT8_SEARCHED, _U8_STEP, summary="TFMQ-DM: int8"),
    _tfmq(
        "temporal-feature-matters",
        _U4,
        _U8_STEP,
        "auto",
        "as tfmq, temporal features kept per step where that is nearer",
    ),
    Recipe(
        "q-diffusion",
        QuantConfig(Scheme(_U4, _U8, (), _LEARNED), (), SPARED, TemporalPolicy("off"), split_shortcuts=True),
        Calibration(samples=32),
        "Q-Diffusion: int4 weights, int8 activations, split shortcuts",
    ),
    Recipe(
        "ptqd",
        QuantConfig(
            Scheme(_U4, _U8, (), _LEARNED),
            (),
            SPARED,
            TemporalPolicy("off"),
            split_shortcuts=True,
            correct_output=True,
        ),
        Calibration(samples=32),
        "PTQD: as q-diffusion, the output corrected per step",
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_GENERAL, *_PAPERS)}


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
    schemes = (config.default, config.temporal.scheme, *(s for _, s in config.overrides))
    return config.split_shortcuts or any(s is not None and s.needs_data for s in schemes)
