"""Compares two models from equal noise: trajectories, pictures, outputs, size and speed; exit code 1 when the gate fails."""

import argparse
import json
from pathlib import Path

from fastdiff.artefact import load, write_report
from fastdiff.cli.quantize import parse_gate, summary
from fastdiff.quantized import measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", help="bundled:dit, bundled:unet, or a folder in diffusers layout")
    parser.add_argument("other", help="the same, or a folder that `quantize` wrote")
    parser.add_argument("-o", "--out", default=None, help="folder for report.json, report.md and grid.png")
    parser.add_argument("--gate", nargs="*", default=[], metavar="FIGURE=BOUND", help="as psnr_db=30; default: none")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    gate = parse_gate(args.gate)
    reference, other = load(args.reference), load(args.other)
    settings = {"samples": args.samples, "solver": args.solver, "steps": args.steps, "seed": args.seed}
    report, images = measure(reference, other, gate=gate, **settings)
    if args.out is not None:
        write_report(report, images, args.out)
    print(json.dumps(report) if args.json else summary(report, Path(args.other)))
    return 1 if report["failures"] else 0
