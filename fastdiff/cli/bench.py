"""Times ops against plain torch and peers; tests each op first and refuses to time one that fails."""

import argparse
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import fastdiff


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m bench.ops`, where the benchmarks are at hand."""
    ops = _benchmarks()
    if ops is None:
        parser.add_argument("ops", nargs="*", metavar="OP")
    else:
        ops.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the suite of the repository's `bench` folder."""
    ops = _benchmarks()
    if ops is None:
        raise RuntimeError("the benchmarks live in the repository; run this command from a checkout of it")
    return ops.run(ops.settings_of(args))


def _benchmarks() -> ModuleType | None:
    """The repository's benchmarks, or None where `bench` is missing or somebody else's."""
    spec = importlib.util.find_spec("bench")
    ours = Path(fastdiff.__file__).parents[1] / "bench"
    if spec is None or str(ours) not in (spec.submodule_search_locations or ()):
        return None
    return importlib.import_module("bench.ops")
