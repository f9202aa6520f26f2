"""Times ops against plain torch and peers; tests each op first and refuses to time one that fails."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m bench.ops`, where the benchmarks are at hand."""
    try:
        from bench import ops
    except ImportError:
        parser.add_argument("ops", nargs="*", metavar="OP")
    else:
        ops.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the suite of the repository's `bench` folder."""
    try:
        from bench import ops
    except ImportError:
        raise RuntimeError("the benchmarks live in the repository; run this command from a checkout of it") from None
    return ops.run(ops.settings_of(args))
