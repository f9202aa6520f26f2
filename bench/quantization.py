"""Quality and speed of quantization recipes: `python -m bench.quantization`.

For every model and recipe: bits, size, PSNR and SSIM to the original at equal seeds, Frechet distance to the test images, and
milliseconds of a network call, measured in turn with the original. Quantized models and features of samples are kept under
--work, so that a stopped run goes on; rows are appended to --out as they are made, and the last of a recipe counts. Samples
come in rounds over all recipes, so that a run that is stopped early has the same number for each.
"""

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch

from bench.fashion_mnist import DEFAULT_FOLDER, load_split, to_unit_range
from bench.quality import features, sample
from bench.quantization_full_size import measure as measure_full_size
from bench.quantization_table import BASELINES, markdown
from bench.timing import interleave
from fastdiff import accelerate
from fastdiff.artefact import FolderStore, load, save, write_json
from fastdiff.models.load import LoadedModel, load_classifier, load_model
from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.perceptual import frechet_distance
from fastdiff.quant.recipes import RECIPES, Recipe
from fastdiff.quantized import calibrate, measure, quantize_model

MODELS = ("bundled:unet", "bundled:dit")
PLAIN = {"float32": "exact", "bfloat16": "bf16"}  # rows without quantization: name -> mode of accelerate
_KEPT = ("psnr_db", "ssim", "noise_sqnr_db_min", "bytes", "bytes_reference")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one form, and the folder where what is known about it is kept."""

    model: str
    recipe: str
    folder: Path

    @property
    def mode(self) -> str:
        """Quantized layers run by their codes, the rest in bfloat16."""
        return PLAIN.get(self.recipe, "bf16")

    def network(self) -> LoadedModel:
        """The model as it is measured, accelerated."""
        model = load_model(self.model) if self.recipe in PLAIN else load(self.folder)
        accelerate(model.net, self.mode)
        return model

    def known(self) -> dict:
        file = self.folder / "row.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def note(self, out: Path, **values: object) -> None:
        """Adds values to what is known, on disk and as a line of the results."""
        known = {"model": self.model, "recipe": self.recipe} | self.known() | values
        write_json(self.folder / "row.json", known)
        with out.open("a") as file:
            file.write(json.dumps(known, sort_keys=True) + "\n")


def shortened(recipe: Recipe, iterations: int, batch: int, lr: float) -> Recipe:
    """The recipe with fewer and larger steps of learned rounding."""
    change = lambda s: (
        s and dataclasses.replace(s, rounding=dataclasses.replace(s.rounding, iters=iterations, batch=batch, lr=lr))
    )
    temporal = dataclasses.replace(recipe.config.temporal, scheme=change(recipe.config.temporal.scheme))
    config = dataclasses.replace(recipe.config, default=change(recipe.config.default), temporal=temporal)
    return dataclasses.replace(recipe, config=config)


def calibration_set(model: str, recipe: Recipe, args: argparse.Namespace) -> CalibrationSet | None:
    """The recipe's states, on the schedule that is measured, drawn with the fused float32 network."""
    if recipe.calibration is None:
        return None
    samples = min(recipe.calibration.samples, args.calibration_samples)
    wanted = dataclasses.replace(recipe.calibration, samples=samples, solver=args.solver, steps=args.steps)
    drawn = load_model(model)
    accelerate(drawn.net)
    return calibrate(drawn, wanted, args.seed + 1000)


def prepare(row: Row, args: argparse.Namespace) -> None:
    """Quantizes the model once, and compares pictures."""
    if "psnr_db" in row.known():
        return
    row.folder.mkdir(parents=True, exist_ok=True)
    reference, extra = load_model(row.model), {}
    if row.recipe in PLAIN:
        bits, made = {"exact": 32.0, "bf16": 16.0}[row.mode], None
    else:
        model = dataclasses.replace(reference, net=copy.deepcopy(reference.net))
        recipe = shortened((RECIPES | BASELINES)[row.recipe], args.iterations, args.rounding_batch, args.lr)
        data = calibration_set(row.model, recipe, args)
        made = quantize_model(model, recipe, data, seed=args.seed + 1000, store=FolderStore(row.folder / "blocks"))
        save(model, made, row.folder)
        weights = [(r.bits, reference.net.get_submodule(r.name).weight.numel()) for r in made.layers if r.scheme]
        bits = sum(b * n for b, n in weights) / sum(n for _, n in weights)
        extra = {"calibration": made.config.calibration.get("sha256")}
    report, _ = measure(reference, row.network(), samples=args.pictures, solver=args.solver, steps=args.steps)
    size = {"bytes": report["bytes_reference"] // (32 // int(bits))} if made is None else {}
    settings = {"solver": args.solver, "steps": args.steps, "pictures": args.pictures}
    row.note(args.out, bits=round(bits, 2), **settings, **{key: report[key] for key in _KEPT} | size | extra)


def draw(row: Row, count: int, args: argparse.Namespace, net, reference: torch.Tensor) -> None:
    """Draws samples until there are `count`, and measures their Frechet distance; more than that are kept."""
    if row.known().get("samples", 0) >= count:
        return
    model, parts = None, []
    for begin in range(0, count, args.chunk):
        file = row.folder / f"features-{begin}.pt"
        if not file.exists():
            model = model or row.network()
            seed = args.seed + begin
            images, _ = sample(model, args.chunk, args.batch, seed, solver=args.solver, steps=args.steps)
            torch.save(features(images, net), file)
        parts.append(torch.load(file))
    row.note(args.out, samples=count, frechet=round(frechet_distance(torch.cat(parts), reference), 4))


def clock(row: Row, args: argparse.Namespace) -> None:
    """Times a network call of one picture and of 16 in turn with float32, everything accelerated; takes 5 seconds."""
    if "ms" in row.known() or row.recipe == "float32":
        return
    networks = {"float32": dataclasses.replace(row, recipe="float32").network(), "this": row.network()}
    times = {}
    for rows in (1, 16):
        run = {name: _call(model, rows) for name, model in networks.items()}
        found = interleave(run, seconds=1.0)
        times[str(rows)] = {name: round(t.median_us / 1e3, 3) for name, t in found.items()}
    row.note(args.out, ms=times, threads=torch.get_num_threads())


def _call(model: LoadedModel, rows: int):
    x, t = torch.randn(rows, model.channels, model.size, model.size), torch.full((rows,), 500.0)
    cond = {} if model.num_classes is None else {"class_labels": torch.arange(rows) % model.num_classes}

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model.net(x, t, **cond)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantization", description=__doc__)
    names = [*PLAIN, *RECIPES, *BASELINES]
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=names, choices=names)
    parser.add_argument("--samples", type=int, default=5000, help="for the Frechet distance; 0 leaves it out")
    parser.add_argument("--chunk", type=int, default=500, help="samples of a recipe before the next one's turn")
    parser.add_argument("--pictures", type=int, default=16, help="for PSNR and SSIM")
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=20000, help="of learned rounding per block")
    parser.add_argument("--calibration-samples", type=int, default=256, help="trajectories at most")
    parser.add_argument("--rounding-batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of learned rounding")
    parser.add_argument("--time", action="store_true", help="also time (3 minutes); on an otherwise idle machine")
    parser.add_argument(
        "--full-size", action="store_true", help="only: time and memory of quantizing DiT-XL/2 and SD1.5"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--work", type=Path, default=Path("build/quantization"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/quantization.jsonl"))
    args = parser.parse_args()
    if args.full_size:
        for row in measure_full_size():
            print(json.dumps(row), flush=True)
        return
    rows = [Row(m, r, args.work / m.replace(":", "-") / r) for m in args.models for r in args.recipes]
    for row in rows:
        prepare(row, args)
        print(row.known(), flush=True)
    net = load_classifier()
    reference = features(to_unit_range(load_split("test", args.data)[0]), net) if args.samples else None
    for count in range(args.chunk, args.samples + 1, args.chunk):
        for row in rows:
            draw(row, count, args, net, reference)
    for row in rows if args.time else ():
        clock(row, args)
    print(markdown([row.known() for row in rows]))


if __name__ == "__main__":
    main()
