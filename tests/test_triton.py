"""Triton kernels against the torch references: in the interpreter on a CPU, compiled where there is a GPU.

`philox_normal` and `solver_step` must be equal bit for bit.
"""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.kernels import group_norm, philox
from fastdiff.kernels import solver_step as kernel
from fastdiff.kernels.rounding import cast, int8_codes
from fastdiff.ops import OPS, backend
from fastdiff.ops.gram import gram
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.solver_step import COEF, META, solver_step
from fastdiff.ops.solver_step_samples import make_call
from fastdiff.ops.strides import strides

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reference = sys.modules[philox_normal.reference.__module__]


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _expect_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    nan = got.isnan() & want.isnan()
    assert torch.equal(_bits(torch.where(nan, 0, got)), _bits(torch.where(nan, 0, want)))


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
    with backend("triton"):
        solver_step(*args)
    for got, want in zip(args[:4], (x, history, model_input, tick), strict=True):
        if got.is_floating_point():
            _expect_same_bits(got, want)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("index", range(0, len(STEPS), 3))
def test_step_is_one_launch_and_nothing_else(index, monkeypatch):
    """Neither torch's kernels nor its memory, nor a look at a value: what a captured graph repeats is one kernel."""
    launches, computed = [], []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    class Torch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                computed.append(func.name())
            return func(*args, **(kwargs or {}))

    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in STEPS[index]]
    monkeypatch.setattr(kernel, "solver_step_kernel", Recorder())
    with backend("triton"), Torch():
        solver_step(*args)
    crooked = [m for m in args[4] if strides(m) is None]  # no kernel's layout: they are copied before
    assert len(launches) == 1 and computed == ["aten::clone"] * len(crooked)


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


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, cast(tl.load(x_ptr + at), out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float8_e4m3fn), ids=str)
def test_casts_round_to_nearest_even(dtype):
    """All signs and exponents with random fractions, and halfway points; e4m3 saturates.

    Without bfloat16's subnormals, which the interpreter drops.
    """
    bits = torch.arange(1 << 16, dtype=torch.int64) << 16 | torch.randint(0, 1 << 16, (1 << 16,))
    bits[::2] &= ~0x7FFF
    x = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    x = torch.where(x.abs() < 2.0**-126, 1.0, x).to(DEVICE)
    if dtype == torch.float8_e4m3fn:
        x = torch.cat(
            [x[x.abs() < 1e4], torch.tensor([464.0, 500.0, -1e4, 447.9, 2.0**-9, -(2.0**-10), 31.08]).to(DEVICE)]
        )
        x = x.flip(0)
        x = x[: 1 << (len(x).bit_length() - 1)]
    want = (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype)
    out = torch.empty_like(want)
    _cast_kernel[(1,)](x, out, N=len(x))
    both = want.float().isnan() & out.float().isnan()
    assert torch.equal(out.float()[~both], want.float()[~both]) and torch.equal(both, want.float().isnan())


@triton.jit
def _codes_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, int8_codes(tl.load(x_ptr + at), 1.0))


def test_codes_round_ties_to_even_and_drop_nan():
    x = torch.cat(
        [torch.arange(-508, 509) / 4.0, torch.tensor([200.0, -1e30, torch.inf, -torch.inf, torch.nan, -0.0, 0.5])]
    )
    x, out = x[:1024].to(DEVICE), torch.empty(1024, dtype=torch.int8, device=DEVICE)
    _codes_kernel[(1,)](x, out, N=1024)
    assert torch.equal(out, torch.round(x).clamp(-127, 127).nan_to_num(0).to(torch.int8))


@pytest.mark.parametrize("name", ("group_norm", "group_norm_nchw"))
def test_group_norm_of_many_pieces(name, monkeypatch):
    """The three launches for large images, made to divide small ones; a sample's bits do not depend on the batch."""
    for limit, value in {
        "SMALL_TILE": 0,
        "TILE": 128,
        "MIN_PIECE": 256,
        "APPLIED_TILE": 64,
        "FINALIZE_BLOCK": 16,
    }.items():
        monkeypatch.setattr(group_norm, limit, value)
    op = OPS[name]
    several = [args for args in op.samples(DEVICE) if 90 <= args[0].numel() <= 400 and args[0].shape[0] > 1]
    for args in several[:2]:
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        truth, plain = op.reference(*wide).double(), op.reference(*args).double()
        with backend("triton"):
            got = op(*args)
        same = plain.isfinite()
        worst = lambda y, truth=truth, same=same: (
            (y[same] - truth[same]).abs().max() / truth[same].abs().max().clamp(min=1)
        )
        assert torch.equal(got.double().isfinite(), same) and worst(got.double()) <= 2 * worst(plain) + 1e-6
        B = args[0].shape[0]
        one = [a[1:2] if isinstance(a, torch.Tensor) and a.dim() > 1 and a.shape[0] == B else a for a in args]
        with backend("triton"):
            assert torch.equal(op(*one).nan_to_num(5), got[1:2].nan_to_num(5))


@pytest.mark.parametrize("name", ("norm_modulate", "gated_norm_modulate", "quantize_rows", "qk_norm_rope"))
def test_rows_do_not_depend_on_the_batch(name):
    op = OPS[name]
    args = next(
        args for args in op.samples(DEVICE) if args[0].dim() >= 2 and args[0].shape[0] == 3 or name == "qk_norm_rope"
    )
    B = args[0].shape[0]
    last = [a[B - 1 :] if isinstance(a, torch.Tensor) and a.dim() > 1 and a.shape[0] == B else a for a in args]
    with backend("triton"):
        whole, alone = op(*args), op(*last)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (whole, alone)), strict=True):
        assert torch.equal(a[B - 1 :].nan_to_num(5), b.nan_to_num(5))
