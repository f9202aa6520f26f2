"""Measures which tiles serve a model's convolutions best on this GPU, and keeps what is faster for later processes."""

import argparse
import dataclasses
import json
from pathlib import Path

from fastdiff import tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = sorted(tuning.CONVOLUTIONS)
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="whose shapes (default: all)")
    parser.add_argument("--batch", type=int, default=2, help="images at once, guidance included (default: 2)")
    types = sorted(tuning.TYPES)
    parser.add_argument("--types", nargs="+", choices=types, default=["bfloat16", "int8"], help="what is multiplied")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help="stop after so long (default: 60)")
    parser.add_argument("--out", type=Path, help="the file (default: the one that later processes read)")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where the budget ended before the last shape."""
    import torch

    from fastdiff.ops import native

    missing = "torch sees no CUDA GPU" if not torch.cuda.is_available() else native.triton_missing()
    if missing:
        raise RuntimeError(f"nothing to tune here: {missing}")
    from fastdiff.kernels import tuned

    device = torch.device("cuda", torch.cuda.current_device())
    machine = tuned.machine_of(device.index)
    calls = tuning.convolutions(args.models, args.batch, args.types, machine)
    choices = []
    for choice in tuning.tune(calls, machine, device, args.budget, tuning.gpu_clock):
        choices.append(choice)
        if not args.json:
            print(line(choice), flush=True)
    path = args.out or tuned.own_file(machine.name)
    tuned.save(path, machine.name, {choice.key: list(choice.after) for choice in choices})
    left = len(calls) - len(choices)
    if args.json:
        print(json.dumps({"file": str(path), "left": left, "choices": [dataclasses.asdict(c) for c in choices]}))
    else:
        print(f"{len(choices)} shapes measured, {left} left; tiles are in {path}")
    return int(left > 0)


def line(choice: tuning.Choice) -> str:
    """One measured shape, for people."""
    gain = choice.before_seconds / choice.after_seconds
    changed = f"{gain:.2f}x with {choice.after}" if choice.after != choice.before else "unchanged"
    return f"{choice.key}: {1e6 * choice.before_seconds:.1f} us, {changed}"
