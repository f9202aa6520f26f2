"""Quantizes a model by a recipe and writes it with a report against the original; exit code 1 when the gate fails."""

import argparse
import copy
import dataclasses
import json
from pathlib import Path

from fastdiff.artefact import FolderStore, save, write_report
from fastdiff.models.load import load_model
from fastdiff.quant.recipes import RECIPES, recipe_of
from fastdiff.quantized import measure, quantize_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="bundled:dit, bundled:unet, or a folder in diffusers layout")
    recipes = "; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items())
    parser.add_argument("--recipe", default="w8a8", help=recipes.replace("%", "%%"))
    parser.add_argument("-o", "--out", required=True, help="folder of the quantized model and its report")
    parser.add_argument(
        "--spare", nargs="*", default=[], metavar="PATTERN", help="further layers to leave as they are"
    )
    parser.add_argument("--gate", nargs="*", default=[], metavar="FIGURE=BOUND", help="as psnr_db=30; default: none")
    parser.add_argument(
        "--resume", default=None, metavar="FOLDER", help="keep finished blocks here and go on from them"
    )
    parser.add_argument("--iterations", type=int, default=None, help="steps of learned rounding per block")
    parser.add_argument("--samples", type=int, default=16, help="pictures of the comparison (default 16)")
    parser.add_argument("--solver", default="ddim", help="of the comparison (default ddim)")
    parser.add_argument("--steps", type=int, default=20, help="of the comparison (default 20)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Quantizes, saves, measures; prints the report's figures."""
    gate = parse_gate(args.gate)
    recipe = recipe_of(args.recipe)
    if args.iterations is not None:
        recipe = recipe.with_iterations(args.iterations)
    reference = load_model(args.model)
    model = dataclasses.replace(reference, net=copy.deepcopy(reference.net))
    store = None if args.resume is None else FolderStore(args.resume)
    show = None if args.json else lambda block: print(f"  {block}", flush=True)
    made = quantize_model(model, recipe, seed=args.seed, spare=args.spare, store=store, progress=show)
    save(model, made, args.out)
    settings = {"samples": args.samples, "solver": args.solver, "steps": args.steps, "seed": args.seed}
    report, images = measure(reference, model, made, gate=gate, **settings)
    report |= {"recipe": recipe.name, "calibration": made.config.calibration}
    write_report(report, images, args.out)
    print(json.dumps(report) if args.json else summary(report, Path(args.out)))
    return 1 if report["failures"] else 0


def parse_gate(bounds: list[str]) -> dict[str, float]:
    """FIGURE=BOUND pairs as numbers."""
    gate = {}
    for bound in bounds:
        name, sign, value = bound.partition("=")
        try:
            gate[name] = float(value)
        except ValueError:
            sign = ""
        if not sign:
            raise ValueError(f"--gate: FIGURE=BOUND expected, as psnr_db=30, got {bound!r}")
    return gate


def summary(report: dict, out: Path) -> str:
    """Three lines about the result, and what to do when the gate failed."""
    ms = report["ms"]
    lines = [
        f"{out}: {report['bytes'] / 1e6:.2f} MB (was {report['bytes_reference'] / 1e6:.2f} MB)",
        f"PSNR {report['psnr_db']:.2f} dB, SSIM {report['ssim']}, outputs at least {report['noise_sqnr_db_min']:.1f} dB",
        f"{ms['quantized']:.2f} ms per call (was {ms['reference']:.2f} ms), {report['samples']} rows",
    ]
    if report["failures"]:
        lines.append(f"gate failed: {'; '.join(report['failures'])}; spare {report['spare']} first (--spare)")
    return "\n".join(lines)
