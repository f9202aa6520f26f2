"""Imports fastdiff from a sanitizer build and commits a planted fault, or runs every CPU sample and random calls without one."""

import itertools
import sys

from fastdiff.ops import OPS, native


def main(fault: str) -> None:
    if fault != "none":
        native.cpu().fault(fault)
        return
    from digest import calls, run
    from random_calls import CALLS, Draw

    count = 0
    for op in OPS.values():
        if any(v.name == "cpu" for v in op.variants):
            random = (CALLS[op.name](Draw.seeded(n), n) for n in range(0, 100, 2))
            for args in itertools.chain(calls(op), random):
                run(op, args)
                count += 1
    print(count)


if __name__ == "__main__":
    main(sys.argv[1])
