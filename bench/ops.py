"""`python -m bench.ops [OP ...]`: tests each op, then times it against its peers and the memory's limit."""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.timing import header, interleave, memory_bandwidth
from fastdiff.ops import OPS

ROOT = Path(__file__).parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to time and how to report it.

    ops      names of ops, all when empty
    shapes   latents instead of the usual ones
    dtype    of the model's data, a key of DTYPES
    against  the peers that the gate looks at, all when empty
    gate     least ratio to a peer, or None
    out      a file that JSON lines are appended to, or None
    plot     a PNG with the ratios, or None
    json     print one JSON object instead of text
    """

    ops: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtype: str = "float32"
    against: tuple[str, ...] = ()
    gate: float | None = None
    out: str | None = None
    plot: str | None = None
    json: bool = False

    def __post_init__(self):
        unknown = [name for name in self.ops if name not in OPS]
        if unknown:
            raise ValueError(f"bench: unknown op {unknown[0]!r}; known are {', '.join(OPS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"bench: unknown dtype {self.dtype!r}; known are {', '.join(DTYPES)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of Settings, without --json."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to time (default: all)")
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="B,C,...", help="shapes instead of the usual latents"
    )
    parser.add_argument("--dtype", default="float32", help=f"of the model's data: {', '.join(DTYPES)}")
    parser.add_argument("--against", nargs="+", default=[], metavar="PEER", help="peers that the gate looks at")
    parser.add_argument("--gate", type=float, help="exit with 1 when a ratio to a peer is below this")
    parser.add_argument("--out", metavar="FILE", help="append JSON lines to this file")
    parser.add_argument("--plot", metavar="PNG", help="draw the ratios (needs matplotlib)")


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings from parsed arguments. Raises ValueError for shapes that are not lists of positive integers."""
    shapes = tuple(tuple(int(n) if n.isdigit() else 0 for n in text.split(",")) for text in args.shape)
    if any(len(shape) < 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(f"bench: --shape takes positive integers like 2,4,64,64, got {' '.join(args.shape)}")
    return Settings(
        *(tuple(args.ops), shapes, args.dtype, tuple(args.against)), args.gate, args.out, args.plot, args.json
    )


def run(settings: Settings) -> int:
    """Times ops. Returns 1 when an op fails its tests or a ratio to a peer is below the gate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = memory_bandwidth(device=device)
    records, failed = [], False
    for name in settings.ops or OPS:
        if not _passes(name):
            print(f"{name}: its tests fail, so it is not timed", file=sys.stderr)
            failed = True
            continue
        records += _time_op(name, device, limit, settings)
    if settings.json:
        print(json.dumps({**header(), "memory_bandwidth": limit, "records": records}, indent=2))
    if settings.out:
        with open(settings.out, "a") as file:
            file.writelines(json.dumps({**header(), **record}) + "\n" for record in records)
    if settings.plot:
        _draw(records, settings.plot)
    return int(failed or _is_below(records, settings))


def _is_below(records: list[dict], settings: Settings) -> bool:
    if settings.gate is None:
        return False
    looked_at = lambda peer: not settings.against or peer in settings.against
    return any(ratio < settings.gate for r in records for peer, ratio in r["ratio"].items() if looked_at(peer))


def _passes(name: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_ops.py", "-k", name, "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def _time_op(name: str, device: str, limit: float, settings: Settings) -> list[dict]:
    records = []
    for case in importlib.import_module(f"bench.cases.{name}").cases(device, settings.shapes, DTYPES[settings.dtype]):
        timings = interleave(case.contenders)
        ours = timings["fastdiff"]
        record = {
            "op": name,
            "case": case.label,
            "device": device,
            "dtype": settings.dtype,
            "timings": {contender: dataclasses.asdict(t) for contender, t in timings.items()},
            "ratio": {peer: t.median_us / ours.median_us for peer, t in timings.items() if peer != "fastdiff"},
            "gb_per_s": case.bytes / ours.median_us / 1e3,
            "fraction_of_memory": case.bytes / (ours.median_us * 1e-6) / limit,
        }
        records.append(record)
        if not settings.json:
            _print(record)
    return records


def _print(record: dict) -> None:
    ours = record["timings"]["fastdiff"]
    ratios = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in record["ratio"].items())
    print(
        f"{record['op']} {record['case']}: {ours['median_us']:.1f} us (p10 {ours['p10_us']:.1f}, p90 {ours['p90_us']:.1f}), "
        f"{record['gb_per_s']:.1f} GB/s = {100 * record['fraction_of_memory']:.0f} % of memory; {ratios}",
        flush=True,
    )


def _draw(records: list[dict], path: str) -> None:
    """Bars of the ratio to each peer, one group per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(f"{r['op']} {r['case']}: {peer}", ratio) for r in records for peer, ratio in r["ratio"].items()]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    axes.barh([label for label, _ in bars], [ratio for _, ratio in bars])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster than the peer ({header()['machine']}, {header()['threads']} threads)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    sys.exit(run(settings_of(parser.parse_args())))
