"""Imports fastdiff from a sanitizer build and commits a planted fault, or runs every CPU sample without one."""

import sys

from fastdiff.ops import OPS, native


def main(fault: str) -> None:
    if fault != "none":
        native.cpu().fault(fault)
        return
    from digest import calls, run

    count = 0
    for op in OPS.values():
        if any(v.name == "cpu" for v in op.variants):
            for args in calls(op):
                run(op, args)
                count += 1
    print(count)


if __name__ == "__main__":
    main(sys.argv[1])
