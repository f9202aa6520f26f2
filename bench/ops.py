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


def main(ops: list[str], *, json_output: bool = False, gate: float | None = None, out: str | None = None) -> int:
    """Times ops (all when empty). Returns 1 when an op fails its tests or a ratio to a peer is below `gate`."""
    unknown = [name for name in ops if name not in OPS]
    if unknown:
        raise ValueError(f"bench: unknown op {unknown[0]!r}; known are {', '.join(OPS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = memory_bandwidth(device=device)
    records, failed = [], False
    for name in ops or list(OPS):
        if not _passes(name):
            print(f"{name}: its tests fail, so it is not timed", file=sys.stderr)
            failed = True
            continue
        records += _time_op(name, device, limit, quiet=json_output)
    if json_output:
        print(json.dumps({**header(), "memory_bandwidth": limit, "records": records}, indent=2))
    if out:
        with open(out, "a") as file:
            file.writelines(json.dumps({**header(), **record}) + "\n" for record in records)
    below = gate is not None and any(ratio < gate for record in records for ratio in record["ratio"].values())
    return int(failed or below)


def _passes(name: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_ops.py", "-k", name, "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def _time_op(name: str, device: str, limit: float, quiet: bool) -> list[dict]:
    records = []
    for case in importlib.import_module(f"bench.cases.{name}").cases(device):
        timings = interleave(case.contenders)
        ours = timings["fastdiff"]
        record = {
            "op": name,
            "case": case.label,
            "device": device,
            "timings": {contender: dataclasses.asdict(t) for contender, t in timings.items()},
            "ratio": {peer: t.median_us / ours.median_us for peer, t in timings.items() if peer != "fastdiff"},
            "gb_per_s": case.bytes / ours.median_us / 1e3,
            "fraction_of_memory": case.bytes / (ours.median_us * 1e-6) / limit,
        }
        records.append(record)
        if not quiet:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gate", type=float)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    sys.exit(main(arguments.ops, json_output=arguments.json, gate=arguments.gate, out=arguments.out))
