"""Frechet distance of samples to the test images: `python -m bench.quality --model bundled:dit --samples 2000`.

The features are those of the bundled classifier. The floor is the distance of as many training images.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.fashion_mnist import DEFAULT_FOLDER, load_split, to_unit_range
from fastdiff import accelerate
from fastdiff.images import grid, save_png
from fastdiff.models.classifier import Classifier
from fastdiff.models.load import LoadedModel, load_classifier, load_model
from fastdiff.models.lower.record import MODES
from fastdiff.quant.perceptual import frechet_distance
from fastdiff.sampler import Sampler
from fastdiff.solvers.compat import process_of

Tensor = torch.Tensor


@torch.no_grad()
def features(images: Tensor, net: Classifier) -> Tensor:
    """Return the classifier's features of images in [-1, 1], `[B, D]` float32."""
    return torch.cat([net.features(part) for part in images.split(500)])


def quality(images: Tensor, data: Path = DEFAULT_FOLDER, net: Classifier | None = None) -> float:
    """Return the Frechet distance of images in [-1, 1], `[B, 1, 32, 32]`, to the test images."""
    net = load_classifier() if net is None else net
    return frechet_distance(features(images, net), features(to_unit_range(load_split("test", data)[0]), net))


def floor(samples: int, data: Path = DEFAULT_FOLDER, net: Classifier | None = None) -> float:
    """Return the distance of as many training images, which perfect samples would have on average."""
    return quality(to_unit_range(load_split("train", data)[0][:samples]), data, net)


def sample(
    model: LoadedModel, samples: int, batch: int = 100, seed: int = 0, guidance: float = 1.0, **settings
) -> tuple[Tensor, Tensor | None]:
    """Draw images in [-1, 1] and their labels: the classes take turns, image i has the seed `seed + i`.

    `settings` are those of `Sampler.sample`, as solver and steps. Labels are None for an unconditional model.
    """
    sampler = Sampler(model.net, prediction=model.prediction, process=process_of(model.scheduler_config))
    images, labels = [], []
    for rows in _batches(samples, batch):
        shape = (len(rows), model.channels, model.size, model.size)
        cond = {}
        if model.num_classes is not None:
            cond["cond"] = {"class_labels": torch.tensor([row % model.num_classes for row in rows])}
            labels.append(cond["cond"]["class_labels"])
            if guidance != 1.0:
                cond["negative"] = {"class_labels": torch.full_like(labels[-1], model.num_classes)}
        images.append(sampler.sample(shape, seed=seed + rows[0], guidance=guidance, **cond, **settings))
    return torch.cat(images).clamp(-1, 1), torch.cat(labels) if labels else None


def _batches(samples: int, batch: int) -> Iterator[range]:
    for begin in range(0, samples, batch):
        yield range(begin, min(begin + batch, samples))


@torch.no_grad()
def agreement(images: Tensor, labels: Tensor, net: Classifier) -> float:
    """Return the share of images in which the classifier sees the class that was asked for."""
    named = torch.cat([net(part).argmax(1) for part in images.split(500)])
    return float((named == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", default="bundled:dit")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="dpmpp-2m")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument(
        "--mode", default="none", choices=["none", *MODES], help="fastdiff.accelerate the network first"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--grid", type=Path, default=None, help="write the first 60 images to this PNG")
    args = parser.parse_args()
    model, net = load_model(args.model), load_classifier()
    settings = {"solver": args.solver, "steps": args.steps, "guidance": args.guidance}
    if args.mode != "none":
        accelerate(model.net, args.mode)
    start = time.perf_counter()
    images, labels = sample(model, args.samples, args.batch, args.seed, **settings)
    report = {"model": args.model, "samples": args.samples, **settings, "mode": args.mode, "seed": args.seed}
    report["seconds"] = round(time.perf_counter() - start, 1)
    report["frechet"] = round(quality(images, args.data, net), 4)
    report["floor"] = round(floor(args.samples, args.data, net), 4)
    if labels is not None:
        report["agreement"] = round(agreement(images, labels, net), 4)
    print(json.dumps(report))
    if args.grid is not None:
        save_png(args.grid, grid(images[:60], columns=10), {"fastdiff": json.dumps(report)})


if __name__ == "__main__":
    main()
