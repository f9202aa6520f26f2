"""Benchmark cases: one file per op, found by the op's name; `cases(device, shapes, dtype)` yields Case objects.

GPU_SHAPES, where a file has them, are what bench/gpu.py times. `shapes` replaces the op's usual ones when it is not empty; `dtype` is that of the data that a model makes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One shape of an op with everything that can do the same work.

    label       the shape, for people
    contenders  name -> callable; the first is ours
    bytes       minimum traffic of one call: every operand once
    flops       of its matrix products
    """

    label: str
    contenders: Mapping[str, Callable[[], object]]
    bytes: int
    flops: int = 0
