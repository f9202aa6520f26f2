"""The CPU kernels on shapes, strides, types and operand counts that nobody chose by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.ops import OPS, backend, native
from fastdiff.ops.solver_step_samples import make_call

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

MODEL_TYPES = tuple(dtype for dtype in native.TYPE_CODES if dtype.is_floating_point)
dims = st.one_of(st.integers(0, 5), st.sampled_from([7, 15, 16, 17, 31, 33, 63, 64, 65, 67]))
shapes = st.lists(dims, min_size=1, max_size=4).filter(lambda s: torch.Size(s).numel() <= 20_000).map(tuple)


@st.composite
def views(draw, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape in the middle of a larger buffer: permuted, with steps, offsets, maybe one dimension expanded."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offsets = [draw(st.integers(0, 3)) for _ in shape]
    flat = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    extents = [offsets[d] + (1 if d == flat else shape[d] * steps[d]) + 1 for d in order]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    buffer = torch.randn(extents, generator=generator, dtype=torch.float64).to(dtype)
    buffer = buffer.permute([order.index(d) for d in range(len(shape))])
    for d in range(len(shape)):
        stop = offsets[d] + (1 if d == flat else shape[d] * steps[d])
        buffer = buffer.narrow(d, offsets[d], stop - offsets[d])
        buffer = buffer[(slice(None),) * d + (slice(None, None, steps[d]),)]
    return buffer.expand(shape)


@st.composite
def steps(draw) -> tuple:
    shape = draw(shapes)
    outputs, source = draw(st.integers(0, 4)), draw(st.booleans())
    model = draw(st.sampled_from(MODEL_TYPES))
    args = list(
        make_call(
            torch.Generator().manual_seed(draw(st.integers(0, 99))),
            "cpu",
            shape=shape,
            state=draw(st.sampled_from((torch.float32, torch.float64))),
            model=model,
            outputs=outputs,
            slots=draw(st.integers(0, 5)),
            copies=draw(st.integers(0, 2)),
            noises=draw(st.integers(0, 2)),
            aux=draw(st.booleans()),
            source=source,
            clamp=draw(st.booleans()),
            skip=draw(st.booleans()),
            fields=draw(st.sampled_from(((), (1, 1), ("C", 1), (1, "E"), ("C", "E")))),
        )
    )
    args[4] = [draw(views((shape[0] + 2 * source, *shape[1:]), model)) for _ in range(outputs)]
    return tuple(args)


def _check_step(args: tuple) -> None:
    wanted = OPS["solver_step"].reference(*args)
    with backend("cpu"):
        OPS["solver_step"](*args)
    for got, want in zip(args[:4], wanted, strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def _check_gram(operands: list[torch.Tensor]) -> None:
    wanted = OPS["gram"].reference(operands)
    with backend("cpu"):
        got = OPS["gram"](operands)
        copies = OPS["gram"]([v.contiguous() for v in operands])
    assert torch.equal(got, copies), "strides changed the bits"
    n = len(operands)
    norms = wanted[:, :, :n].diagonal(dim1=1, dim2=2).sqrt()
    # float32 sums of at most 256 products each: far inside 1e-6 of the norms
    bound = 1e-6 * norms[:, :, None] * norms[:, None, :]
    assert ((got - wanted)[:, :, :n].abs() <= bound + 1e-30).all()
    size = operands[0][0].numel() if len(operands[0]) else 0
    assert ((got - wanted)[:, :, n].abs() <= 1e-6 * norms * size**0.5 + 1e-30).all()


def _check_noise(seeds: list[int], step: int, n: int) -> None:
    seed = torch.tensor(seeds, dtype=torch.int64)
    step, stream = torch.full_like(seed, step).int(), torch.arange(len(seeds)).int()
    with backend("cpu"):
        got = OPS["philox_normal"](seed, step, stream, n)
    assert torch.equal(got, OPS["philox_normal"].reference(seed, step, stream, n))


operands = shapes.flatmap(
    lambda s: st.lists(st.sampled_from(MODEL_TYPES).flatmap(lambda d: views(s, d)), min_size=1, max_size=4)
)
seeds = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)
indices, lengths = st.integers(-(2**31), 2**31 - 1), st.integers(0, 3000)


@given(steps())
def test_any_step(args):
    _check_step(args)


@given(operands)
def test_any_gram(operands):
    _check_gram(operands)


@given(seeds, indices, lengths)
def test_any_noise(seeds, step, n):
    _check_noise(seeds, step, n)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=2000)
@given(steps())
def test_any_step_thoroughly(args):
    _check_step(args)


@pytest.mark.slow
@settings(max_examples=2000)
@given(operands)
def test_any_gram_thoroughly(operands):
    _check_gram(operands)


@pytest.mark.slow
@settings(max_examples=2000)
@given(seeds, indices, lengths)
def test_any_noise_thoroughly(seeds, step, n):
    _check_noise(seeds, step, n)
