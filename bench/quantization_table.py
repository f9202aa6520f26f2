"""What the recipes are compared with, and the table: baselines that leave out what a paper adds."""

from dataclasses import replace

from fastdiff.quant.config import QuantConfig, TemporalPolicy
from fastdiff.quant.recipes import RECIPES, SPARED, Calibration, Recipe
from fastdiff.quant.schemes import Scheme, TensorSpec

_INT8 = TensorSpec("int8", "tensor")
_W8A8 = Scheme(TensorSpec("int8"), _INT8)
_OFF = TemporalPolicy("off")
_STATIC = RECIPES["w8a8-static"].config
_GLOBAL = replace(_STATIC.default, input=replace(_STATIC.default.input, per_step=False))

BASELINES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "naive-w4a8",
            QuantConfig(Scheme(TensorSpec("uint4", symmetric=False), _INT8), (), SPARED, _OFF),
            Calibration(samples=32),
            "the bits of tfmq, nearest codes, extreme values as ranges, one range for all steps",
        ),
        Recipe(
            "one-time-w8a8",
            QuantConfig(_W8A8, (), SPARED, _OFF),
            Calibration("one_time", 256, options=(("t", 500.0),)),
            "the bits of ptq4dm, extreme values at one timestep as ranges",
        ),
        Recipe(
            "global-w8a8",
            replace(_STATIC, default=_GLOBAL),
            RECIPES["w8a8-static"].calibration,
            "w8a8-static with one range for all steps",
        ),
    )
}
_COLUMNS = ("model", "recipe", "bits", "MB", "PSNR dB", "SSIM", "Frechet", "ms, 1 row", "ms, 16 rows")


def markdown(rows: list[dict]) -> str:
    """The rows as a table; what has not been measured is a dash."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
    for r in rows:
        size = f"{r['bytes'] / 1e6:.2f}" if "bytes" in r else "-"
        psnr = "-" if r.get("recipe") == "float32" else _show(r.get("psnr_db"), 2)
        times = [_ms(r, batch) for batch in ("1", "16")]
        figures = (r.get("model"), r.get("recipe"), r.get("bits", "-"), size, psnr, _show(r.get("ssim"), 4))
        lines.append(f"| {' | '.join(map(str, (*figures, _show(r.get('frechet'), 2), *times)))} |")
    return "\n".join(lines)


def _ms(row: dict, batch: str) -> str:
    if "ms" not in row:
        return "-"
    found = row["ms"][batch]
    return f"{found['this']:.2f} ({found['float32'] / found['this']:.2f}x)"


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
