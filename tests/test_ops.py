"""Every variant of every op against float64, on every sample. New ops, variants and samples come in by themselves."""

import copy
import timeit

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.ops import OPS, backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED_ELEMENTS, SLOW_ELEMENTS = 400, 20_000  # larger samples take seconds, or minutes, in Triton's interpreter


def _runnable():
    for op in OPS.values():
        for index, args in enumerate(op.samples(DEVICE)):
            reasons = op.explain(*args)
            largest = max((t.numel() for t in _tensors(args)), default=0)
            for name, why_not in reasons.items():
                size = largest if name == "triton" and DEVICE == "cpu" else 0
                if name != "reference" and not why_not and size <= SLOW_ELEMENTS:
                    marks = [pytest.mark.slow] if size > INTERPRETED_ELEMENTS else []
                    yield pytest.param(op, name, args, id=f"{op.name}-{name}-{index}", marks=marks)


def _tensors(args) -> list[torch.Tensor]:
    flat = [v for a in args for v in (a if isinstance(a, list) else [a])]
    return [v for v in flat if isinstance(v, torch.Tensor)]


def _map(args, change):
    one = lambda v: change(v) if isinstance(v, torch.Tensor) else v
    return [[one(v) for v in a] if isinstance(a, list) else one(a) for a in args]


def _results(op, args, run) -> list[torch.Tensor]:
    """What an op wrote and returned, from fresh copies of the arguments it changes."""
    args = [
        copy.deepcopy(a) if name in op.mutates else a for name, a in zip(op.signature.parameters, args, strict=True)
    ]
    out = run(*args)
    if op.mutates:
        return [a for name, a in zip(op.signature.parameters, args, strict=True) if name in op.mutates]
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _forced(op, name):
    def run(*args):
        with backend(name):
            return op(*args)

    return run


def _truth(op, args) -> list[torch.Tensor]:
    wide = _map(args, lambda t: t.double() if t.is_floating_point() else t)
    out = op.reference(*wide)
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _error(got: torch.Tensor, truth: torch.Tensor, where: torch.Tensor) -> float:
    """Largest error, relative to the largest magnitude where that is above one."""
    truth, got = truth.double()[where], got.double()[where]
    return ((got - truth).abs().max() / truth.abs().max().clamp(min=1)).item() if truth.numel() else 0.0


@pytest.mark.parametrize("op, name, args", list(_runnable()))
def test_variant_is_as_exact_as_torch(op, name, args):
    truth = _truth(op, args)
    plain = _results(op, args, _forced(op, "reference"))
    got = _results(op, args, _forced(op, name))
    for g, p, t in zip(got, plain, truth, strict=True):
        assert g.shape == p.shape and g.dtype == p.dtype
        finite = torch.isfinite(p)
        if p.is_floating_point():
            assert torch.equal(g[~finite].nan_to_num(7), p[~finite].nan_to_num(7)), "other NaN or infinities"
        assert _error(g, t, finite) <= 2 * _error(p, t, finite) + 1e-6


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_op_is_a_well_formed_graph_node(op):
    kept = [args for args in op.samples(DEVICE) if all(t.numel() for t in _tensors(args))]
    for args in (kept[0], kept[-1]):
        torch.library.opcheck(op._node, tuple(args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compiles_into_one_graph(op):
    args = next(args for args in op.samples(DEVICE) if all(t.numel() for t in _tensors(args)))
    eager = _results(op, args, op)
    torch.compiler.reset()
    compiled = _results(op, args, torch.compile(lambda *a: op(*a), backend="aot_eager", fullgraph=True))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_eager_calls_bypass_the_dispatcher(op):
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    args = next(iter(op.samples(DEVICE)))
    with Record():
        _results(op, args, op)
    assert not [name for name in seen if name.startswith("fastdiff")]


def test_the_way_past_the_dispatcher_takes_under_two_microseconds():
    # choosing the variant and calling it; what the variant itself and the checks of arguments take comes on top
    op = OPS["gram"]
    args = next(iter(op.samples("cpu")))
    times = [timeit.timeit(lambda: op.pick(*args), number=2000) / 2000 for _ in range(9)]
    assert min(times) < 2e-6


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_forced_backend_raises_with_the_reason(op):
    args = next(iter(op.samples("cpu")))
    with backend("cuda"), pytest.raises(RuntimeError, match="cuda.*(not cpu|it has)"):
        op(*args)
    with pytest.raises(ValueError, match="unknown name 'nonesuch'.*reference"), backend("nonesuch"):
        pass
    with backend("reference"):
        assert op.pick(*args).name == "reference"
