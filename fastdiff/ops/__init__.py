"""Operations with one contract and several implementations each."""

from fastdiff.ops.attention import attention, attention_lse
from fastdiff.ops.copy import copy
from fastdiff.ops.gram import gram
from fastdiff.ops.linear import linear
from fastdiff.ops.linear_w8a8 import linear_w8a8
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.registry import OPS, Op, backend
from fastdiff.ops.solver_step import solver_step

__all__ = ["OPS", "Op", "attention", "attention_lse", "backend", "copy", "gram", "linear", "linear_w8a8", "philox_normal", "solver_step"]
