"""Times ops against plain torch and peers; tests each op first and refuses to time one that fails."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to time (default: all)")
    parser.add_argument("--gate", type=float, default=None, help="exit with 1 when a ratio to the peer is below this")
    parser.add_argument("--out", default=None, metavar="FILE", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> int:
    """Runs the suite of the repository's `bench` folder."""
    try:
        from bench import ops
    except ImportError:
        raise RuntimeError("the benchmarks live in the repository; run this command from a checkout of it") from None
    return ops.main(args.ops, json_output=args.json, gate=args.gate, out=args.out)
