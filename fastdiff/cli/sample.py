"""Samples from a model into a PNG grid, with the recipe in the file's metadata."""

import argparse
import copy
import json
import time
from pathlib import Path

import torch

import fastdiff
from fastdiff import accelerate
from fastdiff.artefact import load
from fastdiff.images import grid, save_png
from fastdiff.models.load import LoadedModel
from fastdiff.models.lower.record import MODES
from fastdiff.ops import OPS, native
from fastdiff.plain import plain_sample
from fastdiff.plan import Plan
from fastdiff.quant.layer import QLayer
from fastdiff.sampler import Sampler
from fastdiff.solvers import PRESETS, SOLVERS
from fastdiff.solvers.compat import process_of

_COMPARE_ROUNDS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled:dit",
        help="bundled:dit, bundled:unet, or a folder in diffusers layout, quantized or not",
    )
    parser.add_argument("--count", type=int, default=20, help="images (default 20)")
    parser.add_argument("--classes", type=int, nargs="+", default=None, help="class labels, repeated over the images")
    parser.add_argument("--solver", default="dpmpp-2m", help=f"one of {', '.join(SOLVERS)}; suffix -N sets an order")
    parser.add_argument("--compat", choices=PRESETS, default=None, help="take the solver's steps as this code does")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--spacing", default=None, help="spacing of the noise levels (default: the solver's own)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale of class-conditional models")
    parser.add_argument("--seed", type=int, default=0, help="image i uses seed + i")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--mode",
        default="exact",
        choices=[*MODES, "none"],
        help="numbers the network runs in (none: torch's own kernels)",
    )
    parser.add_argument("--out", default="sample.png", help="where the grid goes")
    parser.add_argument("--no-compare", action="store_true", help="do not time plain torch as well")


def run(args: argparse.Namespace) -> int:
    """Samples, writes the grid, prints the time per step and against plain torch."""
    if args.count < 1:
        raise ValueError(f"--count must be >= 1, got {args.count}")
    model = load(args.model)
    model.net.to(args.device).eval()
    plain = copy.deepcopy(model.net)
    mode = _accelerate(model, args)
    cond, negative = _conditions(model, args)
    sampler = Sampler(model.net, prediction=model.prediction, process=process_of(model.scheduler_config))
    settings = {"solver": args.solver, "compat": args.compat, "steps": args.steps, "spacing": args.spacing}
    settings["guidance"] = args.guidance if negative is not None else 1.0
    plan = sampler.plan(args.count, **settings)
    shape = (args.count, model.channels, model.size, model.size)
    call = {"cond": cond, "negative": negative, "seed": args.seed, "device": args.device, **settings}
    start = time.perf_counter()
    images = sampler.sample(shape, progress=not args.json, **call)
    seconds = time.perf_counter() - start
    report = {
        **_identity(model, plan, args),
        "mode": mode,
        "seconds": round(seconds, 4),
        "ms_per_call": round(1e3 * seconds / plan.ticks, 3),
    }
    if not args.no_compare:
        report |= _compare(sampler, plain, plan, shape, call)
    save_png(Path(args.out), grid(images), {"fastdiff": json.dumps(report)})
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _accelerate(model: LoadedModel, args: argparse.Namespace) -> str:
    """Puts the network on fused kernels where they run; returns the mode."""
    quantized = any(isinstance(layer, QLayer) for layer in model.net.modules())
    if args.mode == "none" or quantized or torch.device(args.device).type != "cpu" or native.cpu() is None:
        return "none"
    accelerate(model.net, args.mode)
    return args.mode


def _conditions(model: LoadedModel, args: argparse.Namespace) -> tuple[dict, dict | None]:
    """Class labels and the null class, for class-conditional models."""
    if model.num_classes is None:
        if args.classes is not None:
            raise ValueError(f"--classes: {model.name} is unconditional")
        return {}, None
    labels = args.classes if args.classes is not None else list(range(model.num_classes))
    if not all(0 <= label < model.num_classes for label in labels):
        raise ValueError(f"--classes: labels must be in 0..{model.num_classes - 1}, got {labels}")
    rows = torch.tensor([labels[i % len(labels)] for i in range(args.count)], device=args.device)
    return {"class_labels": rows}, {"class_labels": torch.full_like(rows, model.num_classes)}


def _identity(model: LoadedModel, plan: Plan, args: argparse.Namespace) -> dict:
    return {
        "version": fastdiff.__version__,
        "torch": torch.__version__,
        "model": model.name,
        "solver": args.solver,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "classes": args.classes,
        "plan": plan.digest(),
        "network_calls": plan.calls,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "kernels": {
            name: OPS[name].preferred(torch.device(args.device).type) for name in ("solver_step", "philox_normal")
        },
        "out": str(args.out),
    }


def _compare(sampler: Sampler, plain: torch.nn.Module, plan: Plan, shape: tuple, call: dict) -> dict:
    """Times the engine and plain torch on the same plan and noise, interleaved; empty for stochastic solvers."""
    noise = sampler.initial_state(shape, plan, call["seed"], call["device"])
    contenders = {
        "plain_torch": lambda: plain_sample(plain, plan, noise, call["cond"], call["negative"]),
        "fastdiff": lambda: sampler.sample(shape, **call),
    }
    runs = {name: [] for name in contenders}
    try:
        for _ in range(_COMPARE_ROUNDS):
            for name, run in contenders.items():
                runs[name].append(_timed(run))
    except ValueError:
        return {}
    ours, theirs = (min(seconds for _, seconds in runs[name]) for name in ("fastdiff", "plain_torch"))
    difference = float((runs["fastdiff"][0][0] - runs["plain_torch"][0][0]).abs().max())
    return {
        "ms_per_call": round(1e3 * ours / plan.ticks, 3),
        "plain_torch_ms_per_call": round(1e3 * theirs / plan.ticks, 3),
        "speedup": round(theirs / ours, 3),
        "max_difference_to_plain_torch": difference,
    }


def _timed(run) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    with torch.no_grad():
        out = run()
    if out.is_cuda:
        torch.cuda.synchronize()
    return out, time.perf_counter() - start


def _text(report: dict) -> str:
    lines = [
        f"{report['out']}: {report['model']}, {report['solver']}, {report['steps']} steps, {report['network_calls']} network calls"
    ]
    lines.append(
        f"{report['seconds']:.2f} s, {report['ms_per_call']:.2f} ms per step, mode {report['mode']}, on {report['device']} ({report['threads']} threads)"
    )
    if "speedup" in report:
        lines.append(
            f"plain torch: {report['plain_torch_ms_per_call']:.2f} ms per step; speed-up {report['speedup']:.2f}x, "
            f"largest difference {report['max_difference_to_plain_torch']:.1e}"
        )
    kernels = ", ".join(f"{op} by {variant}" for op, variant in report["kernels"].items())
    return "\n".join([*lines, f"kernels: {kernels}; plan {report['plan']}"])
