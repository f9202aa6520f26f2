"""The CUDA kernels' element code, compiled for the CPU: the same bits as the C++ kernels and the torch references.

What this leaves to a GPU: grids, barriers, shuffles, the ticket, and the order in which threads meet memory.
"""

import ctypes
import functools

import pytest
import torch
from nvcc import ROOT, compile_host, find_nvcc

from fastdiff.ops import backend, gram, native, solver_step
from fastdiff.ops.solver_step import COEF, _coef_strides
from fastdiff.ops.solver_step_samples import make_call
from fastdiff.ops.strides import evenly_strided, sizes

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
FLAT, FIELD = 1, 2  # what solver_step_host returns
STEP_SAMPLES, GRAM_SAMPLES = list(solver_step.samples("cpu")), list(gram.samples("cpu"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return ctypes.CDLL(str(compile_host(ROOT / "tests/native/cuda_host.cu", tmp_path_factory.mktemp("host"))))


def _ints(values) -> ctypes.Array:
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def _step(library, call: tuple, flat: bool = True) -> int:
    x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed = call
    tensors = (x, history, model_input, tick, None, aux, coef, meta, rows, seed, source)
    even = [evenly_strided(m) for m in outputs]
    kinds = [(m.data_ptr(), native.TYPE_CODES[m.dtype], m.shape[0], *stride) for m, stride in even]
    return library.solver_step_host(
        _ints([0 if t is None else t.data_ptr() for t in tensors]),
        _ints([native.TYPE_CODES[x.dtype], native.TYPE_CODES[model_input.dtype]]),
        _ints([*sizes(x), history.shape[0], model_input.shape[0], rows.shape[0], coef.shape[0]]),
        _ints(_coef_strides(coef)),
        len(even),
        _ints([number for kind in kinds for number in kind]),
        int(flat),
    )


def _copy(call: tuple) -> tuple:
    """The four arguments that a step overwrites become copies."""
    return (*(t.clone() for t in call[:4]), *call[4:])


def _assert_same_bits(got: tuple, expected: tuple) -> None:
    for name, a, b in zip(("x", "history", "model_input", "tick"), got, expected, strict=False):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@functools.cache
def _expected(n: int) -> tuple:
    call = _copy(STEP_SAMPLES[n])
    with backend("reference"):
        solver_step(*call)
    return call


@pytest.mark.parametrize("flat", (True, False))
@pytest.mark.parametrize("n", range(len(STEP_SAMPLES)))
def test_solver_step_has_the_bits_of_the_reference(library, n, flat):
    call = _copy(STEP_SAMPLES[n])
    _step(library, call, flat)
    _assert_same_bits(call, _expected(n))


def test_samples_take_every_path(library):
    taken = {_step(library, _copy(call)) for call in STEP_SAMPLES}
    assert taken == {0, FLAT, FIELD}


@pytest.mark.parametrize("shape", ((2, 4, 6, 10), (3, 5, 3, 3)))
def test_two_noises_and_every_operand(library, shape):
    make = functools.partial(make_call, device="cpu", shape=shape, outputs=4, slots=5, copies=2, noises=2, aux=True)
    call, expected = make(torch.Generator().manual_seed(3)), make(torch.Generator().manual_seed(3))
    assert _step(library, call) == (FLAT if shape[1] == 4 else 0)
    with backend("reference"):
        solver_step(*expected)
    _assert_same_bits(call, expected)


@pytest.mark.parametrize("keep", (0, 1))
def test_a_field_of_zero_input_scales_writes_nothing(library, keep):
    """c_in decides for a whole sample: one element that is not zero makes all of them written."""
    call = make_call(torch.Generator().manual_seed(1), "cpu", shape=(1, 2, 3, 3), fields=("C", "E"))
    call[2].fill_(5.0)
    scale = call[7][:, COEF.index("c_in")]
    scale[:] = 0
    scale[:, -1, -1] = keep
    expected = _copy(call)
    _step(library, call)
    with backend("reference"):
        solver_step(*expected)
    _assert_same_bits(call, expected)
    assert bool((call[2] == 5.0).all()) == (keep == 0)


def test_nan_passes_the_clamp(library):
    call = make_call(torch.Generator().manual_seed(2), "cpu", shape=(1, 4, 2, 2), clamp=True, outputs=1)
    call[4][0][0, 0] = float("nan")
    expected = _copy(call)
    _step(library, call)
    with backend("reference"):
        solver_step(*expected)
    assert call[0].isnan().any() and torch.equal(call[0].isnan(), expected[0].isnan())


def _break(call: tuple, what: str) -> None:
    *_, source, _, _, meta, rows, _ = call
    if what == "tick":
        call[3].fill_(rows.shape[0])
    elif what == "rows":
        rows.fill_(meta.shape[0])
    elif what == "meta":
        meta[:, 0] = call[1].shape[0]
    else:
        source.fill_(1000)


@pytest.mark.parametrize("what", ("tick", "rows", "meta", "source"))
def test_an_index_out_of_range_touches_nothing(library, what):
    call = make_call(torch.Generator().manual_seed(4), "cpu", shape=(2, 4, 4, 4), source=True, noises=2)
    _break(call, what)
    before = _copy(call)
    _step(library, call)
    _assert_same_bits(call[:3], before[:3])
    assert call[3].item() == before[3].item() + (what != "tick")


def _gram(library, operands: list[torch.Tensor]) -> torch.Tensor:
    """The first launch on the CPU; the second one's sum over chunks in torch."""
    first, n = operands[0], len(operands)
    batch, channels, elements = sizes(first)
    even = [evenly_strided(v) for v in operands]
    partial = torch.full((batch, n * (n + 3) // 2, max(channels * elements // 4096 + 1, 1)), float("nan")).double()
    numbers = [number for v, stride in even for number in (v.data_ptr(), native.TYPE_CODES[v.dtype], *stride)]
    chunks = library.gram_host(
        ctypes.c_void_p(partial.data_ptr()), n, _ints(numbers), *map(ctypes.c_int64, sizes(first))
    )
    products = n * (n + 3) // 2
    total = partial.flatten()[: batch * products * chunks].view(batch, products, chunks).sum(2)
    out = torch.empty(batch, n, n + 1, dtype=torch.float64)
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    for k, (i, j) in enumerate(pairs):
        out[:, i, j] = out[:, j, i] = total[:, k]
    out[:, :, n] = total[:, len(pairs) :]
    return out


@pytest.mark.parametrize("n", range(len(GRAM_SAMPLES)))
def test_gram_is_as_accurate_as_torch(library, n):
    (operands,) = GRAM_SAMPLES[n]
    exact = gram.reference([v.double() for v in operands])
    wide = torch.float64 if any(v.dtype == torch.float64 for v in operands) else torch.float32
    rows = torch.stack([v.reshape(v.shape[0], -1).to(wide) for v in operands], 1) if exact.numel() else None
    if rows is None or rows.numel() == 0:
        assert torch.equal(_gram(library, operands), exact)
        return
    plain = torch.cat([rows @ rows.transpose(1, 2), rows.sum(2, keepdim=True)], 2).double()
    # sums that cancel are judged by the size of what is summed
    scale = gram.reference([v.double().abs() for v in operands])
    error = ((_gram(library, operands) - exact).abs() / scale).max()
    assert error <= 2 * ((plain - exact).abs() / scale).max() + 1e-6
