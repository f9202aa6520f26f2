"""Prints versions, devices and which kernels run here, with a sentence for each that does not."""

import argparse
import json

from fastdiff import info as machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where an op has nothing but its reference."""
    found = machine.collect()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return int(machine.slow_only(found))


def _print(found: dict) -> None:
    packages = ", ".join(f"{name} {version or 'absent'}" for name, version in found["packages"].items())
    cpu = found["cpu"]
    level = cpu["instruction_set"]
    print(f"fastdiff {found['fastdiff']}, Python {found['python']}, {packages}")
    print(f"CPU: {cpu['model']} ({cpu['machine']}), {cpu['threads']} threads", end="")
    print(f", kernels for {level['used']} (detected {level['detected']})" if level else f"; {cpu['missing']}")
    for gpu in found["gpus"]:
        print(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not found["gpus"]:
        print("GPU: none that torch can use")
    for op, variants in found["kernels"].items():
        print(f"{op}:")
        for name, why in variants.items():
            print(f"  {name:<10} {why or 'usable'}")
