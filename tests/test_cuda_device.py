"""The CUDA kernels on a GPU: bits of the CPU, graphs, streams, and sizes that need more than one grid."""

import itertools

import pytest
import torch

from fastdiff.ops import backend, gram, native, philox_normal, solver_step
from fastdiff.ops.solver_step import bind
from fastdiff.ops.solver_step_samples import make_call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda_missing() is not None, reason=f"no CUDA kernels: {native.cuda_missing()}"),
]
STEPS = 6


def _assert_same_bits(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def test_philox_normal_has_the_bits_of_the_cpu():
    for here, there in zip(philox_normal.samples("cuda"), philox_normal.samples("cpu"), strict=True):
        with backend("cuda"):
            got = philox_normal(*here)
        _assert_same_bits([got], [philox_normal.reference(*there)])


def test_solver_step_has_the_bits_of_the_reference():
    for here, there in zip(solver_step.samples("cuda"), solver_step.samples("cpu"), strict=True):
        with backend("cuda"):
            solver_step(*here)
        with backend("reference"):
            solver_step(*there)
        _assert_same_bits(here[:4], there[:4])


def test_gram_ignores_batch_and_repetition():
    operands = [torch.randn(5, 3, 91, 91, generator=torch.Generator().manual_seed(k)).cuda() for k in range(8)]
    with backend("cuda"):
        all_of_them = gram(operands)
        for b in range(5):
            assert torch.equal(gram([v[b : b + 1] for v in operands])[0], all_of_them[b])
    exact = gram.reference([v.double().cpu() for v in operands])
    scale = gram.reference([v.double().abs().cpu() for v in operands])
    assert ((all_of_them.cpu() - exact).abs() / scale).max() < 1e-6


def _bound(seed: int, device: str, shape=(2, 4, 64, 64)):
    """A bound step over a table of several lines, its outputs, and what it overwrites."""
    call = list(make_call(torch.Generator().manual_seed(seed), device, shape=shape, noises=1, slots=3, copies=2))
    call[3].zero_()
    lines = torch.arange(STEPS * shape[0], dtype=torch.int32, device=device).view(STEPS, shape[0])
    call[9] = lines % call[8].shape[0]
    fixed = (*call[:4], call[5], *call[6:])
    return bind(*fixed), call[4], call[:4]


def _run_on_cpu(seed: int, steps: int, **arguments) -> list[torch.Tensor]:
    step, outputs, state = _bound(seed, "cpu", **arguments)
    for _ in range(steps):
        step(outputs)
    return state


def test_a_replayed_graph_advances_the_tick():
    with backend("cuda"):
        step, outputs, state = _bound(0, "cuda")
        step(outputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(outputs)
        for _ in range(STEPS - 2):
            graph.replay()
    assert step.ticket.item() == 0
    _assert_same_bits(state, _run_on_cpu(0, STEPS - 1))


def test_a_captured_call_that_is_not_bound_resets_its_ticket():
    with backend("cuda"):
        call = make_call(torch.Generator().manual_seed(0), "cuda", shape=(3, 4, 64, 64))
        solver_step(*call)
        call[3].zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            solver_step(*call)
    for line in (1, 2):
        graph.replay()
        assert call[3].item() == line


def test_two_streams_do_not_share_anything():
    with backend("cuda"):
        bound = [_bound(seed, "cuda", shape=(4, 4, 128, 128)) for seed in (1, 2)]
        torch.cuda.synchronize()
        for _, (stream, (step, outputs, _)) in itertools.product(
            range(STEPS), zip((torch.cuda.Stream(), torch.cuda.Stream()), bound, strict=True)
        ):
            with torch.cuda.stream(stream):
                step(outputs)
        torch.cuda.synchronize()
    for seed, (_, _, state) in zip((1, 2), bound, strict=True):
        _assert_same_bits(state, _run_on_cpu(seed, STEPS, shape=(4, 4, 128, 128)))


def test_more_samples_than_a_grid_has_rows():
    batch = 70_000
    with backend("cuda"):
        step, outputs, state = _bound(5, "cuda", shape=(batch, 1, 2, 2))
        step(outputs)
        seed = torch.arange(batch, device="cuda")
        zero = torch.zeros(batch, dtype=torch.int32, device="cuda")
        noise = philox_normal(seed, zero, zero, 4)
        sums = gram([noise])
    _assert_same_bits(state, _run_on_cpu(5, 1, shape=(batch, 1, 2, 2)))
    _assert_same_bits([noise], [philox_normal.reference(seed.cpu(), zero.cpu(), zero.cpu(), 4)])
    exact = gram.reference([noise.cpu()])
    assert (sums.cpu() - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_a_tick_past_the_table_touches_nothing():
    with backend("cuda"):
        step, outputs, state = _bound(6, "cuda")
        state[3].fill_(STEPS)
        before = [t.clone() for t in state]
        step(outputs)
    _assert_same_bits(state, before)
    assert step.ticket.item() == 0
