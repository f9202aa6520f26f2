"""Measures, per solver, its order, its error against the closed form, its row invariants, and the difference to diffusers."""

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--solvers", nargs="*", default=["all"], metavar="NAME", help="solvers to verify (default: all)"
    )
    parser.add_argument("--against", choices=("exact", "diffusers"), default="exact", help="what to compare with")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 on any failure."""
    from fastdiff.solvers.verify import verify

    names = "all" if args.solvers == ["all"] else args.solvers
    records = verify(names, against=args.against)
    if args.json:
        print(json.dumps([dataclasses.asdict(record) for record in records], indent=2, default=str))
    else:
        for record in records:
            print(record)
        failed = sum(not record.passed for record in records)
        print(f"{len(records) - failed} passed, {failed} failed")
    return int(any(not record.passed for record in records))
