"""`python -m bench.models --model NAME ... [--variants NAME,NAME ...]`: whole denoisers, ours beside the peers.

Every variant lives in a process of its own and keeps its model; the parent lets them run in turns, so that all see the
same state of the machine. The first variant is what the others are compared with. Graphs for OpenVINO are exported and
quantized once and kept in the folder that FASTDIFF_BENCH_CACHE names (default ~/.cache/fastdiff-bench).
"""

import argparse
import json
import sys

from bench.models import peak
from bench.models.report import records, table
from bench.models.rounds import Limits, measure
from bench.models.variants import VARIANTS
from bench.models.workloads import WORKLOADS, select
from bench.timing import header

DEFAULT = "fastdiff-w8a8,fastdiff-bf16,fastdiff-exact,openvino-int8,openvino-bf16,torch-fp32,torch-bf16,torch-compile"


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    try:
        workloads, variants = select(args.model), _variants(args.variants)
        limits = Limits(args.threads, args.rounds, args.seconds, args.memory, args.lock, args.nice)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    peaks = _peaks(args.peaks) or peak.measure(args.threads)
    machine = {**header(), "threads": args.threads, "peaks": peaks}
    measured = ", ".join(f"{precision} {giga:.0f}" for precision, giga in peaks.items())
    print(f"{machine['machine']}, {args.threads} threads; peak G(FL)OP/s: {measured or 'unknown'}", flush=True)
    for workload in workloads:
        about, found = measure(workload, variants, limits)
        rows = records(workload, about, found, peaks)
        print("\n" + table(workload, about, rows), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.writelines(json.dumps({**machine, **row}) + "\n" for row in rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["bundled_dit"], metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--variants", default=DEFAULT, metavar="NAME,...", help=", ".join(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="samples per variant, each of a quarter second or more")
    parser.add_argument("--seconds", type=float, default=60.0, help="after so many, a slow variant sits out")
    parser.add_argument(
        "--memory", type=int, default=0, metavar="MB", help="what may be loaded at once (default: free)"
    )
    parser.add_argument("--lock", default="", metavar="FILE", help="hold this file's lock during the rounds")
    parser.add_argument("--nice", type=int, default=0, help="of this session during the rounds (Linux)")
    parser.add_argument("--peaks", default="", metavar="int8=N,...", help="G(FL)OP/s instead of measuring them")
    parser.add_argument("--json", metavar="FILE", help="append JSON lines to this file")
    return parser


def _variants(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"bench.models: unknown variant {unknown[0]!r}; known are {', '.join(VARIANTS)}")
    return names


def _peaks(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {precision: float(number) for precision, _, number in pairs}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
