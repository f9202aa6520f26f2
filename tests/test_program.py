"""Recorded programs and the arena: the same numbers as eager calls, on memory that is used again."""

import threading
import weakref

import pytest
import torch

from fastdiff.ops import gram, native
from fastdiff.ops.memory import Arena, Shelf, empty, use_arena
from fastdiff.program import GraphProgram, NotCapturableError, Program

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


def _norms(x):
    return gram([gram([x])[:, 0]])


def test_program_repeats_with_new_inputs():
    x, y = torch.randn(2, 3, 4, 50, 50).unbind()
    program = Program(_norms, (x,))
    assert len(program) == 2
    for values in (x, y, x.transpose(2, 3)):
        torch.testing.assert_close(program(values), _norms(values), rtol=0, atol=0)


def test_profile_names_every_call():
    program = Program(_norms, (torch.randn(3, 40),))
    profile = program.profile()
    assert [name for name, _ in profile] == ["gram", "gram"] and all(0 < us < 1e6 for _, us in profile)


def test_programs_keep_what_they_read():
    constants = [torch.randn(40, 50)]
    program = Program(lambda x: gram([x, constants[0]]), (torch.randn(40, 50),))
    x, expected = torch.randn(40, 50), constants[0].clone()
    reads = [weakref.ref(tensor) for tensor in constants]
    constants.clear()
    assert reads[0]() is not None
    torch.testing.assert_close(program(x), gram([x, expected]), rtol=0, atol=0)


def test_results_are_fresh_memory():
    x = torch.randn(3, 40)
    program = Program(_norms, (x,))
    first = program(x)
    kept = first.clone()
    program(x + 1)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "work",
    (
        lambda x: gram([x * 2]),
        lambda x: gram([x]).sum(),
        lambda x: gram([x.double()]),
        lambda x: gram([x.add_(1)]),
        lambda x: gram([x.t().reshape(-1)]),
        lambda x: gram([x[torch.tensor([1, 0])]]),
        lambda x: gram([x.t().contiguous()]),
        lambda x: gram([x, x][: int(x[0, 0] * 0) + 1]),
    ),
)
def test_torch_computations_are_refused(work):
    with pytest.raises(NotCapturableError, match="torch (computed|ran)"):
        Program(work, (torch.randn(2, 5),))
    # and recording has ended: other calls on this thread are not added anywhere
    assert len(Program(lambda x: gram([x]), (torch.randn(2, 5),))) == 1


class _Replay:
    """What a captured graph does, without the capture: the body once more."""

    def __init__(self, body, device, pool):
        self.replay = body
        body()


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr("fastdiff.program.StepGraph", _Replay)
    monkeypatch.setattr(Arena, "pool", None)


def test_graphs_repeat_with_new_inputs_and_keep_what_they_read(graphs):
    constants = [torch.randn(3, 4, 50), torch.randn(3, 4, 50)]
    reads = [weakref.ref(tensor) for tensor in constants]
    work = lambda x: gram([x * constants[0], constants[1]])  # torch may compute, too
    x, y = torch.randn(2, 3, 4, 50).unbind()
    program = GraphProgram(work, (x,))
    expected = [work(values) for values in (x, y)]
    first, second = program(x), program(y)
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert program.holds(y) and not program.holds(x) and torch.equal(program.outputs[0], second)
    assert set(program._constants) == {t.untyped_storage().data_ptr() for t in constants}
    constants[:] = [torch.zeros(3, 4, 50)] * 2
    assert all(read() is not None for read in reads)


def test_other_shapes_are_refused():
    program = Program(lambda x: gram([x]), (torch.randn(2, 5),))
    with pytest.raises(ValueError, match=r"shape \(2, 5\), got \(2, 6\)"):
        program(torch.randn(2, 6))


def test_threads_take_turns():
    inputs = [torch.randn(4, 5000, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    program = Program(_norms, (inputs[0],))
    expected, got = [_norms(x) for x in inputs], [None] * 8

    def work(i):
        for _ in range(20):
            got[i] = program(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_only_the_recording_thread_is_recorded():
    x, y = torch.randn(2, 5), torch.randn(3, 4)

    def work(x):
        other = threading.Thread(target=gram, args=([y],))
        other.start()
        other.join()
        return gram([x])

    assert len(Program(work, (x,))) == 1


def test_arena_uses_memory_again_only_when_nobody_holds_it():
    arena = Arena()
    a = arena.empty((100,), torch.float32)
    view = a[10:20].view(2, 5)
    del a
    b = arena.empty((100,), torch.float32)
    assert b.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    address, held = view.untyped_storage().data_ptr(), arena.nbytes
    del view
    c = arena.empty((7, 11), torch.float32)
    assert c.data_ptr() == address and arena.nbytes == held
    assert b.data_ptr() % 64 == c.data_ptr() % 64 == 0
    assert arena.empty((0, 3), torch.bfloat16).shape == (0, 3)


def test_arena_serves_ops_inside_the_block_only():
    arena = Arena()
    with use_arena(arena):
        inside = empty((1000,), torch.float32)
    held = arena.nbytes
    empty((5000,), torch.float32)
    assert inside.shape == (1000,) and held == arena.nbytes >= 4000


def test_shelf_keeps_tensors_apart_and_aligned():
    shelf = Shelf()
    originals = [torch.arange(n, dtype=dtype) for n in (5, 1, 300) for dtype in (torch.int8, torch.float32)]
    kept = [shelf.keep(t) for t in originals]
    large = shelf.keep(torch.ones(9 << 20))  # more than a region
    for t, k in zip(originals, kept, strict=True):
        assert torch.equal(t, k) and k.data_ptr() % 64 == 0 and k.data_ptr() != t.data_ptr()
    del shelf
    assert large.sum() == 9 << 20 and torch.equal(kept[-1], originals[-1])  # memory stays as long as what lies on it
