"""Quality and speed of quantization recipes: `python -m bench.quantization --model bundled:unet --samples 5000`.

One row per recipe: bits, size, PSNR and SSIM to the original at equal seeds, Frechet distance to the test images, and
milliseconds per network call, measured in turn with the original.
"""

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch

from bench.fashion_mnist import DEFAULT_FOLDER
from bench.quality import quality, sample
from fastdiff.models.load import LoadedModel, load_classifier, load_model
from fastdiff.quant.recipes import RECIPES, Recipe
from fastdiff.quantized import measure, quantize_model

_COLUMNS = ("recipe", "bits", "MB", "PSNR dB", "SSIM", "Frechet", "ms per call")


def shortened(recipe: Recipe, iterations: int | None, lr: float | None) -> Recipe:
    """The recipe with another number of steps of learned rounding, and another learning rate."""
    if iterations is not None:
        recipe = recipe.with_iterations(iterations)
    if lr is None:
        return recipe
    faster = lambda s: s and dataclasses.replace(s, rounding=dataclasses.replace(s.rounding, lr=lr))
    temporal = dataclasses.replace(recipe.config.temporal, scheme=faster(recipe.config.temporal.scheme))
    config = dataclasses.replace(recipe.config, default=faster(recipe.config.default), temporal=temporal)
    return dataclasses.replace(recipe, config=config)


def frechet(model: LoadedModel, args: argparse.Namespace, classifier) -> float | None:
    """Distance of the model's samples to the test images, None without samples."""
    if not args.samples:
        return None
    images, _ = sample(model, args.samples, args.batch, args.seed, solver=args.solver, steps=args.steps)
    return round(quality(images, args.data, classifier), 3)


def row(name: str, reference: LoadedModel, args: argparse.Namespace, classifier) -> dict:
    """Quantizes a copy of the model and measures it."""
    model = dataclasses.replace(reference, net=copy.deepcopy(reference.net))
    made = quantize_model(model, shortened(RECIPES[name], args.iterations, args.lr), seed=args.seed)
    report, _ = measure(reference, model, made, samples=args.pictures, solver=args.solver, steps=args.steps)
    weights = [(r.bits, model_weights(reference, r.name)) for r in made.layers if r.scheme is not None]
    bits = sum(b * n for b, n in weights) / max(sum(n for _, n in weights), 1)
    kept = {key: report[key] for key in ("psnr_db", "ssim", "noise_sqnr_db_min", "bytes", "bytes_reference", "ms")}
    return {"recipe": name, "bits": round(bits, 2), **kept, "frechet": frechet(model, args, classifier)}


def model_weights(model: LoadedModel, layer: str) -> int:
    """Number of weights of a layer."""
    return model.net.get_submodule(layer).weight.numel()


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
    for r in rows:
        psnr, ssim, bits = (r.get(key, "-") for key in ("psnr_db", "ssim", "bits"))
        figures = (r["recipe"], bits, f"{r['bytes'] / 1e6:.2f}", psnr, ssim, r["frechet"] or "-", r["milliseconds"])
        lines.append(f"| {' | '.join(str(f) for f in figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantization", description=__doc__)
    parser.add_argument("--model", default="bundled:unet")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--samples", type=int, default=5000, help="for the Frechet distance; 0 leaves it out")
    parser.add_argument("--pictures", type=int, default=16, help="for PSNR and SSIM")
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=None, help="of learned rounding per block")
    parser.add_argument("--lr", type=float, default=None, help="of learned rounding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=None, help="append the rows to this JSON lines file")
    args = parser.parse_args()
    reference, classifier = load_model(args.model), load_classifier()
    rows, baseline = [], frechet(reference, args, classifier)
    for name in args.recipes:
        found = row(name, reference, args, classifier) | {"model": args.model, "threads": torch.get_num_threads()}
        found["milliseconds"] = f"{found['ms']['quantized']} (was {found['ms']['reference']})"
        rows.append(found)
        print(json.dumps(found), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
    size = sum(p.nbytes for p in reference.net.parameters())
    head = {"recipe": "original", "bits": 32, "bytes": size, "frechet": baseline, "milliseconds": "-"}
    print(markdown([head, *rows]))


if __name__ == "__main__":
    main()
