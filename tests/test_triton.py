"""Triton kernels against the torch references: in the interpreter on a CPU, compiled where there is a GPU.

`philox_normal` and `solver_step` must be equal bit for bit. One exception, in the interpreter of Triton 3.6 only: it cuts a
float32 down to bfloat16 where a GPU rounds to nearest even, so there bfloat16 model inputs are compared with cut values.
"""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastdiff.kernels import philox
from fastdiff.kernels import solver_step as kernel
from fastdiff.ops import backend
from fastdiff.ops.gram import gram
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.solver_step import COEF, META, solver_step
from fastdiff.ops.solver_step_samples import make_call

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
reference = sys.modules[philox_normal.reference.__module__]


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _expect_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    nan = got.isnan() & want.isnan()
    assert torch.equal(_bits(torch.where(nan, 0, got)), _bits(torch.where(nan, 0, want)))


def _cut(values: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16 by dropping bits, as the interpreter does."""
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def test_constants_are_those_of_the_reference():
    for name in ("LOG_POLYNOMIAL", "SIN_POLYNOMIAL", "COS_POLYNOMIAL", "LN2_HIGH", "LN2_LOW"):
        assert getattr(philox, name).value == getattr(reference, name)
    assert philox.ANGLE_UNIT.value == reference.HALF_PI * 2.0**-30
    assert (philox.MULTIPLIER_0.value, philox.MULTIPLIER_1.value) == reference._MULTIPLIERS
    assert (philox.KEY_STEP_0.value, philox.KEY_STEP_1.value) == reference._KEY_STEPS


def test_columns_are_those_of_the_contract():
    assert [getattr(kernel, name).value for name in COEF] == list(range(len(COEF)))
    assert kernel.META.value == len(META)


@pytest.mark.parametrize("sample", list(philox_normal.samples(DEVICE)), ids=lambda s: f"{s[0].numel()}x{s[3]}")
def test_noise_has_the_bits_of_the_reference(sample):
    with backend("triton"):
        got = philox_normal(*sample)
    assert torch.equal(_bits(got), _bits(philox_normal.reference(*sample)))


STEPS = list(solver_step.samples(DEVICE))


@pytest.mark.parametrize("index", range(len(STEPS)))
def test_step_has_the_bits_of_the_reference(index):
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in STEPS[index]]
    x, history, model_input, tick = solver_step.reference(*args)
    cut = INTERPRETED and model_input.dtype == torch.bfloat16
    if cut:
        wide = [*args[:2], args[2].float(), *args[3:]]
        model_input = _cut(solver_step.reference(*wide)[2])
    with backend("triton"):
        solver_step(*args)
    for got, want in zip(args[:4], (x, history, model_input, tick), strict=True):
        if got.is_floating_point():
            _expect_same_bits(got, want)
        else:
            assert torch.equal(got, want)


def test_step_spreads_over_several_programs_and_lines():
    """More samples than programs are told apart, and the line moves on by one a call, not one a program."""
    args = list(make_call(torch.Generator().manual_seed(5), DEVICE, shape=(3, 2, 40, 31), outputs=2, slots=2))
    args[3].zero_()
    for line in (1, 2):
        want = solver_step.reference(*args)
        with backend("triton"):
            solver_step(*args)
        assert int(args[3]) == line
        for got, expected in zip(args[:3], want[:3], strict=True):
            _expect_same_bits(got, expected)


def test_step_lets_programs_take_several_samples(monkeypatch):
    monkeypatch.setattr(kernel, "_MAX_PROGRAMS", 3)
    args = list(make_call(torch.Generator().manual_seed(6), DEVICE, shape=(7, 3, 10, 10), noises=1))
    want = solver_step.reference(*args)
    with backend("triton"):
        solver_step(*args)
    for got, expected in zip(args, want, strict=False):
        if got.is_floating_point():
            _expect_same_bits(got, expected)


def test_clamp_keeps_nan():
    args = list(make_call(torch.Generator().manual_seed(7), DEVICE, shape=(1, 1, 4, 8), clamp=True))
    args[0][0, 0, 0, 0] = float("nan")
    with backend("triton"):
        solver_step(*args)
    assert args[0][0, 0, 0, 0].isnan() and args[0].isnan().sum() == 1


@pytest.mark.parametrize("index", range(len(list(gram.samples(DEVICE)))))
def test_sums_are_as_exact_as_their_products(index):
    """Every sum within 2^-22 of the sum of magnitudes: rounding of float32 products and of a chunk's partial sums."""
    (operands,) = list(gram.samples(DEVICE))[index]
    with backend("triton"):
        got = gram(operands)
    scale = gram.reference([v.double().abs() for v in operands])
    unit = 2.0**-46 if any(v.dtype == torch.float64 for v in operands) else 2.0**-22
    assert ((got - gram.reference(operands)).abs() <= unit * scale).all()
    assert torch.equal(got[:, :, :-1], got[:, :, :-1].transpose(1, 2))
    if operands[0].shape[0] > 1 and 0 < operands[0].numel() < 5000:
        with backend("triton"):
            alone = gram([v[1:2] for v in operands])
        assert torch.equal(alone[0], got[1])  # whatever else is in the batch
