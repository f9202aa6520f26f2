"""What a quantized artefact says about itself: the JSON report and its form for people."""

from collections.abc import Mapping
from typing import Any

from fastdiff.quant.quantize import Quantized

_WORST = 10  # layers listed by name


def describe(made: Quantized) -> dict[str, Any]:
    """Sizes, bits and signal-to-noise ratios of the layers, as JSON values."""
    quantized = [record for record in made.layers if record.scheme is not None]
    weights = sum(r.nbytes for r in quantized)
    layers = {
        record.name: {
            "bits": round(record.bits, 3),
            "bytes": record.nbytes,
            "weight_sqnr_db": None if record.sqnr_db is None else round(min(record.sqnr_db, 200.0), 3),
            "weight": None if record.scheme is None else record.scheme.weight.dtype,
            "input": None if record.scheme is None or record.scheme.input is None else record.scheme.input.dtype,
            "drift": None if record.drift is None else round(record.drift, 3),
            "note": record.note,
        }
        for record in made.layers
    }
    return {
        "bytes": made.nbytes,
        "bytes_quantized_layers": weights,
        "layers_quantized": len(quantized),
        "layers_spared": len(made.layers) - len(quantized),
        "sqnr_db": {r.name: round(min(r.sqnr_db, 200.0), 3) for r in quantized if r.sqnr_db is not None},
        "layers": layers,
        "calibration_sha256": made.calibration,
    }


def layer_to_spare(report: Mapping[str, Any]) -> str | None:
    """The quantized layer whose output is worst: what a failed gate suggests to leave in floating point."""
    ratios = report.get("output_sqnr_db") or report.get("sqnr_db") or {}
    return min(ratios, key=ratios.get, default=None)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: figures, worst layers, divergence by step, layers that stayed as they are."""
    lines = [f"# {report.get('model', 'model')}: {report.get('recipe', 'comparison')}", ""]
    lines += _table(
        ("figure", "value"), [(name, _show(report[name])) for name in _FIGURES if report.get(name) is not None]
    )
    if report.get("failures"):
        lines += ["", "**The gate failed:** " + "; ".join(report["failures"]) + "."]
        lines += [f"Spare `{report.get('spare')}` first (`--spare`)."]
    ratios = report.get("output_sqnr_db") or report.get("sqnr_db")
    if ratios:
        worst = sorted(ratios, key=ratios.get)[:_WORST]
        layers = report.get("layers", {})
        rows = [
            (f"`{n}`", _show(layers.get(n, {}).get("bits")), _show(report["sqnr_db"].get(n)), _show(ratios[n]))
            for n in worst
        ]
        lines += ["", "## Worst layers", "", *_table(("layer", "bits", "weight SQNR dB", "output SQNR dB"), rows)]
    if report.get("steps"):
        rows = [
            (str(i), _show(t), _show(noise), _show(step["psnr_db"]), _show(step["ssim"]), _show(step.get("lpips")))
            for i, (t, noise, step) in enumerate(
                zip(report["times"], report["noise_sqnr_db"], report["steps"], strict=False)
            )
        ]
        head = ("step", "time", "output SQNR dB", "trajectory PSNR dB", "SSIM", "LPIPS")
        lines += ["", "## Divergence by step", "", *_table(head, rows)]
    spared = [(f"`{n}`", layer["note"]) for n, layer in report.get("layers", {}).items() if layer["weight"] is None]
    if spared:
        lines += ["", "## Layers in floating point", "", *_table(("layer", "why"), spared)]
    return "\n".join(lines) + "\n"


_FIGURES = (
    *("psnr_db", "ssim", "lpips", "noise_sqnr_db_min", "frechet", "frechet_reference", "bytes", "bytes_reference"),
    *("layers_quantized", "layers_spared", "ms", "samples", "solver", "sampling_steps", "seed", "seconds"),
    *("calibration", "calibration_sha256"),
)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(item)}" for name, item in value.items())
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
