"""Operations with one contract and several implementations each."""

from fastdiff.ops.gram import gram
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.registry import OPS, Op, backend
from fastdiff.ops.solver_step import solver_step

__all__ = ["OPS", "Op", "backend", "gram", "philox_normal", "solver_step"]
