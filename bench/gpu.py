"""`python -m bench.gpu [--quick] [--out FILE.jsonl] [--budget SECONDS]`: checks every kernel on a CUDA machine, then times
it, and whole networks where diffusers is installed.

Records go to bench/results/<gpu>-<date>.jsonl as they are made, a Markdown table to the terminal. Exit code 1 when a check
fails (nothing is timed then), 2 without a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu_checks import check_cases, check_graph, check_graphs, check_memory, check_numbers
from bench.gpu_networks import NETWORKS, network_timings
from bench.gpu_ops import op_timings
from bench.gpu_solver import SHAPES, call, solver_timings
from bench.timing import header, memory_bandwidth
from fastdiff.ops.solver_step import solver_step


def main(quick: bool, out: Path | None, budget: float) -> int:
    if not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA GPU; run it on a machine that has one", file=sys.stderr)
        return 2
    deadline = time.monotonic() + budget
    machine = {**header(), "cuda": torch.version.cuda, "memory_bandwidth": memory_bandwidth(1 << 28, "cuda")}
    name = f"{machine['machine'].replace(' ', '-').lower()}-{machine['date']}.jsonl"
    out = out or Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine['machine']}: copies {machine['memory_bandwidth'] / 1e9:.0f} GB/s; records go to {out}")
    with out.open("a") as file:
        write = lambda record: print(json.dumps({**machine, **record}), file=file, flush=True)
        if failed := _check(quick, write):
            print(f"bench.gpu: {failed} checks failed, so nothing is timed", file=sys.stderr)
            return 1
        print(TABLE_HEAD)
        seconds = 0.3 if quick else 1.0
        for record in _timings(machine["memory_bandwidth"], seconds, deadline):
            write(record)
            print(table_line(record), flush=True)
    return 0


def _check(quick: bool, write) -> int:
    failed = 0
    for record in _checks(quick):
        write(record)
        if record["pass"] is False:
            failed += 1
            print(f"FAILED {record}", file=sys.stderr)
    return failed


def _checks(quick: bool) -> Iterator[dict]:
    yield from check_numbers("cuda")
    yield from check_cases("cuda")
    yield from check_graphs("cuda")
    for variant, refusal in solver_step.explain(*call("dpmpp-2m", SHAPES[0], "cuda", 0)).items():
        if variant != "reference":
            missing = {"check": "graph", "variant": variant, "pass": None, "why": refusal}
            yield missing if refusal else check_graph("cuda", variant)
    if not quick:
        yield check_memory()


def _timings(bandwidth: float, seconds: float, deadline: float) -> Iterator[dict]:
    yield from solver_timings("cuda", bandwidth, seconds)
    yield from op_timings("cuda", bandwidth, seconds, deadline)
    yield from network_timings(NETWORKS, "cuda", bandwidth, seconds, deadline)


TABLE_HEAD = "| op | case | contender | us | p10 | p90 | % of copy | TFLOP/s |\n|---|---|---|---|---|---|---|---|"


def table_line(record: dict) -> str:
    """One row of the table that the terminal shows."""
    case = record.get("case") or f"{record.get('row', '')} {record['shape']}".strip()
    if "skipped" in record:
        return f"| {record['op']} | {case} | {record.get('contender', '')} | skipped: {record['skipped']} |||||"
    numbers = (record["median_us"], record["p10_us"], record["p90_us"], 100 * record["fraction_of_memory"])
    cells = " | ".join(f"{number:.2f}" for number in (*numbers, record.get("tflops", 0.0)))
    return f"| {record['op']} | {case} | {record['contender']} | {cells} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter timings, no sanitizer")
    parser.add_argument("--out", type=Path, help="where the records go")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no more ops are timed")
    arguments = parser.parse_args()
    sys.exit(main(arguments.quick, arguments.out, arguments.budget))
