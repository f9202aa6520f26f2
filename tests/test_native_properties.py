"""The CPU kernels on shapes, strides, types and settings that nobody chose by hand: random calls of every op."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import _error, _forced, _results, _truth

from fastdiff.ops import OPS, native

sys.path.append(str(Path(__file__).parent / "native"))
from random_calls import CALLS, SIZES, Draw

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

# one defined order of operations: the bits of the reference
EXACT = ("copy", "philox_normal", "quantize_rows", "quantize_static", "solver_step")
# what rounding to bfloat16, to codes of 1/127 and to weights of 1/255 may change where two sums differ in their last bit
ATTENTION = {"f32": 1e-6, "bf16": 4e-3, "int8": 2e-2}


def _check_gram(args: tuple) -> None:
    (operands,) = args
    wanted, got = OPS["gram"].reference(operands), _results(OPS["gram"], args, _forced(OPS["gram"], "cpu"))[0]
    copies = _results(OPS["gram"], ([v.contiguous() for v in operands],), _forced(OPS["gram"], "cpu"))[0]
    assert torch.equal(got, copies), "strides changed the bits"
    n = len(operands)
    norms = wanted[:, :, :n].diagonal(dim1=1, dim2=2).sqrt()
    # float32 sums of at most 256 products each: far inside 1e-6 of the norms
    bound = 1e-6 * norms[:, :, None] * norms[:, None, :]
    assert ((got - wanted)[:, :, :n].abs() <= bound + 1e-30).all()
    size = operands[0][0].numel() if len(operands[0]) else 0
    assert ((got - wanted)[:, :, n].abs() <= 1e-6 * norms * size**0.5 + 1e-30).all()


def _check(name: str, args: tuple) -> None:
    """The kernel against float64, as near as plain torch; a code may differ by one where a rounding was close."""
    if name == "gram":
        return _check_gram(args)
    op = OPS[name]
    got, plain = (_results(op, args, _forced(op, variant)) for variant in ("cpu", "reference"))
    slack = ATTENTION[args[-1]] if name.startswith("attention") else 1e-6
    for g, p, truth in zip(got, plain, plain if name in EXACT else _truth(op, args), strict=True):
        assert g.shape == p.shape and g.dtype == p.dtype
        if name in EXACT:
            assert torch.equal(g.nan_to_num(7), p.nan_to_num(7))
        elif g.dtype == torch.int8:
            assert _codes_apart(g, p) <= 1
        else:
            finite = torch.isfinite(p)
            assert torch.equal(g[~finite].nan_to_num(7), p[~finite].nan_to_num(7)), "other NaN or infinities"
            assert _error(g, truth, finite) <= 2 * _error(p, truth, finite) + slack


def _codes_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max()) if a.numel() else 0


def test_every_op_has_random_calls():
    native_ops = {name for name, op in OPS.items() if any(v.name == "cpu" for v in op.variants)}
    assert native_ops == CALLS.keys(), "give a new op a function in tests/native/random_calls.py"


def test_random_calls_reach_the_kernels():
    for name, make in CALLS.items():
        for seed in range(40):
            args = make(Draw.seeded(seed), SIZES[seed % len(SIZES)])
            assert not OPS[name].explain(*args)["cpu"], name


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=12)
@given(st.data())
def test_any_call(name, data):
    pick = lambda options: data.draw(st.sampled_from(options))
    _check(name, CALLS[name](Draw(pick), pick(SIZES)))


# seeds instead of hypothesis: a third of the time, and the seed is the example
@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_any_call_thoroughly(name):
    for seed in range(2000):
        draw = Draw.seeded(seed)
        try:
            _check(name, CALLS[name](draw, draw.pick(SIZES)))
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}") from error
