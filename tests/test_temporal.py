"""The temporal table: right rows, computed once, within its memory."""

import pytest
import torch
from torch import nn

from fastdiff.temporal import TemporalTable


class _Time(nn.Module):
    def __init__(self, width=24, labels=5):
        super().__init__()
        self.label = nn.Embedding(labels, 16)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, width))

    def forward(self, t, labels):
        angles = t.float()[:, None] * torch.exp(-torch.arange(16) / 3.0)
        return self.net(angles.sin() + self.label(labels))


@pytest.fixture
def time_net():
    return _Time().requires_grad_(False)


T = torch.tensor([999.0, 500.5, 999.0, 1.0])
LABELS = torch.tensor([1, 2, 1, 4])


@pytest.mark.parametrize("exact", (False, True))
def test_rows_are_those_of_the_network(time_net, exact):
    table = TemporalTable(time_net, exact=exact)
    expected = time_net.double()(T.double(), LABELS)
    time_net.float()
    for _ in range(2):
        torch.testing.assert_close(table.lookup(T, LABELS).double(), expected, rtol=1e-6, atol=1e-6)


def test_exact_rows_have_the_bits_of_the_batch(time_net):
    table = TemporalTable(time_net, exact=True)
    for rows in (slice(0, 4), slice(0, 1), slice(1, 3)):
        assert torch.equal(table.lookup(T[rows], LABELS[rows]), time_net(T[rows], LABELS[rows]))


def test_rows_are_computed_once(time_net):
    table = TemporalTable(time_net)
    table.lookup(T, LABELS)
    assert table.computed == 3  # two of the four rows are equal
    table.lookup(T.flip(0), LABELS.flip(0))
    table.lookup(T[:1], LABELS[:1])
    assert table.computed == 3
    table.lookup(T, LABELS.flip(0))
    assert table.computed > 3
    table.clear()
    table.lookup(T[:1], LABELS[:1])
    assert table.nbytes == 24 * 4


def test_a_schedule_is_computed_at_once(time_net):
    table, batches = TemporalTable(lambda *a: batches.append(len(a[0])) or time_net(*a)), []
    times, labels = torch.linspace(1, 999, 20).repeat_interleave(2), torch.tensor([1, 4]).repeat(20)
    table.prepare(times, labels)
    assert table.computed == 40 and len(batches) <= 2 and min(batches) >= 16
    for i in range(0, 40, 2):
        table.lookup(times[i : i + 2], labels[i : i + 2])
    assert table.computed == 40 and len(batches) <= 2


def test_memory_is_bounded_and_rows_stay_right(time_net):
    table = TemporalTable(time_net, max_bytes=10 * 24 * 4)
    times = torch.arange(40.0)
    table.prepare(times, torch.zeros(40, dtype=torch.long))
    assert table.computed == 1, "a schedule that does not fit is not computed in vain"
    for t in (times[:4], times[4:30], times[2:5]):
        labels = torch.zeros(len(t), dtype=torch.long)
        torch.testing.assert_close(table.lookup(t, labels), time_net(t, labels), rtol=1e-5, atol=1e-6)
        assert table.nbytes <= 10 * 24 * 4


def test_vectors_are_conditioning_too():
    table = TemporalTable(lambda t, pooled: pooled.float() * t[:, None])
    pooled = torch.randn(3, 8).bfloat16()
    t = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(table.lookup(t, pooled), pooled.float() * t[:, None])
    changed = pooled.clone()
    changed[1, 3] += 1
    assert torch.equal(table.lookup(t, changed), changed.float() * t[:, None])
    assert table.computed == 4


@pytest.mark.parametrize("unit, dtype", ((1, torch.float32), (1000, torch.float32), (1000, torch.bfloat16)))
def test_a_known_schedule_is_filled_when_its_conditioning_is_met(unit, dtype):
    sizes = []
    table = TemporalTable(lambda t, pooled: sizes.append(len(t)) or pooled.float() * t[:, None])
    times = torch.linspace(999, 1, 12)
    table.schedule = lambda: times
    for pooled in torch.randn(2, 3, 8):
        asked = table.computed
        for t in times:
            t = t.to(dtype).expand(3) / unit
            assert torch.equal(table.lookup(t, pooled), pooled * t[:, None].float())
        assert table.computed == asked + 3 * len(set((times.to(dtype) / unit).tolist()))
    assert len(sizes) == 3 and min(sizes) >= 16, "the first row tells the size, the others come at once"
    table.lookup(torch.tensor([0.123]), torch.ones(1, 8))
    assert sizes[-1] == 1, "a time outside of the schedule comes alone"


def test_a_schedule_that_does_not_fit_is_told_and_not_tried_again():
    table = TemporalTable(lambda t, pooled: pooled * t[:, None], max_bytes=10 * 8 * 4)
    table.schedule = lambda: torch.arange(40.0)
    for t in torch.arange(6.0)[:, None]:
        assert torch.equal(table.lookup(t, torch.ones(1, 8)), torch.ones(1, 8) * t[:, None])
    assert table.computed == 6 and "for a schedule, which do not fit" in str(table)


def test_rows_of_a_schedule_do_not_tell_how_they_were_met(time_net):
    fresh = TemporalTable(time_net)
    once = TemporalTable(time_net)
    labels = torch.tensor([1, 4, 2])
    once.schedule = lambda: torch.linspace(999, 1, 30)
    once.lookup(once.schedule()[:1].expand(3), labels)
    for steps in (5, 9, 30):
        fresh.schedule = lambda steps=steps: torch.linspace(999, 1, steps)
        rows = [fresh.lookup(t.expand(3), labels) for t in fresh.schedule()]
    assert torch.equal(rows[0], once.lookup(torch.full((3,), 999.0), labels))
