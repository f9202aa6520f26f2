"""The engine as a service: order, reports, futures, shutting down, and requests that it refuses."""

import asyncio
import queue
from concurrent.futures import wait

import pytest
import torch
from engine_networks import SECONDS, SHAPE, Gate, elementwise_net, sampler_of

from fastdiff import Engine


def test_first_come_first_served():
    """Of two places one is free, which a request of two samples waits for; nobody who came later may take it."""
    gate, ends = Gate(), []
    with Engine(sampler_of(gate), max_rows=2) as engine:
        shapes, steps = [(1, 3), (2, 3), (1, 5), (1, 3)], [3, 2, 1, 1]
        for n, (shape, count) in enumerate(zip(shapes, steps, strict=True)):
            engine.submit(shape, steps=count, solver="ddim").add_done_callback(lambda _, n=n: ends.append(n))
        gate.open()
    assert sorted(ends[2:]) == [2, 3] and ends[:2] == [0, 1] and gate.rows == [1, 1, 1, 2, 2, 1, 1]
    report = engine.report()
    assert 0.0 <= report.mean_wait_s <= report.longest_wait_s < SECONDS


def test_the_report_counts_what_ran():
    sampler = sampler_of()
    arguments = [
        dict(shape=(3, *SHAPE), steps=[2, 5, 3], solver="heun", guidance=[1.0, 2.0, 3.0], negative={}),
        dict(shape=(1, *SHAPE), steps=7, solver="ddim"),
    ]
    with Engine(sampler) as engine:
        for one in arguments:
            engine.submit(**one)
    plans = [
        sampler.arguments(one.pop("shape"), None, None, one.pop("negative", None), 0, one).plan for one in arguments
    ]
    report = engine.report()
    assert report.rows == sum(int((plan.rows >= 0).sum()) for plan in plans)
    assert report.evaluations == sum(plan.calls for plan in plans)
    assert (report.finished, report.waiting, report.running) == (2, 0, 0) and report.busy_s > 0.0
    assert report.rows_per_step == report.rows / report.steps and "2 finished" in str(report)


def test_shutting_down_finishes_what_there_is_or_cancels_it():
    gate, sampler = Gate(), sampler_of()
    engine = Engine(sampler_of(gate), max_rows=1)
    requests = [engine.submit((1, *SHAPE), steps=3, seed=n) for n in range(2)]
    gate.wait()
    engine.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shut down"):
        engine.submit((1, *SHAPE))
    gate.open()
    engine.shutdown()
    for n, request in enumerate(requests):
        assert torch.equal(request.result(0), sampler.sample((1, *SHAPE), steps=3, seed=n))
    gate = Gate()
    with pytest.raises(OSError), Engine(sampler_of(gate), max_rows=1) as engine:
        requests = [engine.submit((1, *SHAPE), steps=3) for _ in range(2)]
        gate.wait()
        requests[1].add_done_callback(lambda _: gate.open())
        raise OSError
    assert all(request.cancelled() for request in requests) and engine.report().cancelled == 2


def test_a_request_is_a_future():
    gate, told = Gate(), []
    with Engine(sampler_of(gate), max_rows=1) as engine:
        requests = [engine.submit((1, *SHAPE), steps=2, seed=n) for n in range(3)]
        requests[0].add_done_callback(lambda _: engine.shutdown())  # from the engine's own thread
        requests[0].add_done_callback(told.append)
        gate.wait()
        assert requests[0].running() and not requests[1].running() and not wait(requests, timeout=0).done
        with pytest.raises(TimeoutError):
            requests[0].result(timeout=0.001)

        async def both():
            one, two = (asyncio.wrap_future(request) for request in requests[:2])
            two.cancel()
            await asyncio.sleep(0)
            gate.open()
            return await asyncio.wait_for(one, SECONDS), two.cancelled()

        state, cancelled = asyncio.run(both())
        assert len(wait(requests, timeout=SECONDS).done) == 3
    assert told == [requests[0]] and cancelled and requests[1].cancelled()
    assert torch.equal(state, sampler_of().sample((1, *SHAPE), steps=2))


def test_what_a_request_was_given_may_change_afterwards():
    gate, x, shift = Gate(), torch.randn(1, *SHAPE), torch.ones(1)
    arguments = dict(solver="ddim", steps=3)
    expected = sampler_of().sample(x=x, cond={"shift": shift}, **arguments)
    with Engine(sampler_of(gate), max_rows=1) as engine:
        engine.submit((1, *SHAPE), steps=1)
        gate.wait()
        request = engine.submit(x=x, cond={"shift": shift}, **arguments)
        x.zero_(), shift.zero_()
        gate.open()
    assert torch.equal(request.result(), expected)


BAD = {
    "hooks": ({"hooks": []}, ValueError, "hooks cannot be set per request"),
    "graph": ({"graph": True}, ValueError, "graph cannot be set per request"),
    "too many samples": ({"shape": (5, *SHAPE)}, ValueError, "1 to 4 samples"),
    "no samples": ({"shape": (0, *SHAPE)}, ValueError, "1 to 4 samples"),
    "unknown solver": ({"solver": "dpmpp-9x"}, ValueError, "dpmpp-2m"),
    "no negative": ({"guidance": 2.0, "cond": {"shift": torch.zeros(1)}}, ValueError, "negative="),
    "NaN conditioning": ({"cond": {"shift": torch.full((1,), torch.nan)}}, ValueError, "holds NaN"),
    "integer state": ({"shape": None, "x": torch.zeros(1, 3, dtype=torch.int64)}, TypeError, "floating point"),
    "endpoint": ({"aux": torch.zeros(3)}, ValueError, "shaped like the state"),
    "unknown setting": ({"priority": 3}, ValueError, "unknown setting 'priority'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_submit(case):
    called = []
    arguments, kind, message = BAD[case]
    with Engine(sampler_of(lambda x, t: called.append(1)), max_rows=4) as engine:
        with pytest.raises(kind, match=message):
            engine.submit(**{"shape": (1, *SHAPE), **arguments})
        assert engine.report().waiting == engine.report().running == 0
    assert not called


def test_a_full_queue_and_bad_settings_are_refused():
    gate = Gate()
    with Engine(sampler_of(gate), max_rows=1, max_queue=2) as engine:
        requests = [engine.submit((1, *SHAPE), steps=1)]
        gate.wait()
        requests += [engine.submit((1, *SHAPE), steps=1) for _ in range(2)]
        with pytest.raises(queue.Full, match="2 requests wait"):
            engine.submit((1, *SHAPE))
        assert (engine.report().waiting, engine.report().running) == (2, 1)
        gate.open()
    assert all(request.result() is not None for request in requests)
    with pytest.raises(TypeError, match="give Sampler"):
        Engine(elementwise_net)
    for settings in ({"max_rows": 0}, {"max_rows": None}, {"max_queue": 0}):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            Engine(sampler_of(), **settings)
