"""The engine: every request gets what the sampler gives it alone, whatever runs beside it, fails or leaves."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from engine_networks import SECONDS, SHAPE, Gate, elementwise_net, same, sampler_of

from fastdiff import CFG, SOLVERS, VE, Cancelled, Engine, Hook, NonFiniteError, Sampler


def any_request(choose: random.Random) -> dict:
    """Arguments of a request, of one of several kinds."""
    B = choose.choice([1, 1, 1, 2, 3])
    one = lambda values: [choose.choice(values) for _ in range(B)] if choose.random() < 0.5 else choose.choice(values)
    column, gain = choose.choice([(B,), (B, 1)]), choose.choice([{}, {"gain": 0.2}, {"gain": 0.3}])
    guided = {
        "cond": {"shift": torch.tensor([choose.uniform(-1, 1) for _ in range(B)]).view(column), **gain},
        "negative": {"shift": -torch.ones(column), **gain},
        "guidance": one([1.0, 1.5, 4.0, CFG(3.0, interval=(0.2, 0.7))]),
    }
    state = choose.choice(
        [
            {"shape": (B, *SHAPE)},
            {"shape": (B, *SHAPE)},
            {"shape": (B, 7), "dtype": torch.float64},
            {"x": {"a": torch.randn(B, 3), "b": torch.randn(B, 2, 2)}},
        ]
    )
    seed = [choose.randrange(2**62) for _ in range(B)]
    settings = {"solver": one(list(SOLVERS)), "steps": one(list(range(3, 13))), "seed": seed}
    return settings | state | (guided if choose.random() < 0.7 else {})


@pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_four_threads_of_random_requests_get_the_bits_of_each_alone(count):
    sampler, results = sampler_of(), []

    def user(seed):
        choose = random.Random(seed)
        for _ in range(count):
            arguments = any_request(choose)
            results.append((arguments, engine.submit(**arguments)))
            time.sleep(choose.choice([0.0, 0.001, 0.004]))

    with Engine(sampler, max_rows=6) as engine:
        threads = [threading.Thread(target=user, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4 * count
    for arguments, request in results:
        assert request.done() and request.progress.done == request.progress.total
        assert same(request.result(0), sampler.sample(**arguments)), arguments


def test_with_micro_batch_1_networks_whose_kernels_depend_on_the_batch_give_equal_bits_too():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(30, 512), torch.nn.SiLU(), torch.nn.Linear(512, 30)
    )
    sampler = sampler_of(lambda x, t: layers(x).view_as(x), micro_batch=1)
    with Engine(sampler) as engine:
        requests = [engine.submit((1, *SHAPE), seed=[seed], steps=5 + seed) for seed in range(8)]
    for seed, request in enumerate(requests):
        assert torch.equal(request.result(), sampler.sample((1, *SHAPE), seed=[seed], steps=5 + seed))


def test_a_request_joins_while_others_run_and_leaves_before_them():
    """The later one needs another branch and more history, so the memory of the first one is enlarged while it runs."""
    gate, sampler = Gate(), sampler_of()
    first = dict(shape=(1, *SHAPE), solver="ddim", steps=9, seed=1)
    later = dict(shape=(2, *SHAPE), solver="dpmpp-3m", steps=[2, 4], seed=2, guidance=2.0, negative={})
    with Engine(sampler_of(gate)) as engine:
        one = engine.submit(**first)
        gate.wait()
        gate.let(2)
        two = engine.submit(**later)
        gate.let(3)
        assert two.progress == (2, 4) and one.progress == (5, 9)
        gate.open()
    assert gate.rows == [1, 1, 1, 5, 5, 3, 3, 1, 1]
    assert same(one.result(), sampler.sample(**first)) and same(two.result(), sampler.sample(**later))


def test_a_preview_is_the_state_of_that_step():
    arguments = dict(shape=(2, *SHAPE), solver="euler-a", steps=[3, 6], seed=4)
    states, gate = list(sampler_of().step(**arguments)), Gate()
    with Engine(sampler_of(gate)) as engine:
        engine.submit((1, *SHAPE), steps=20)
        request = engine.submit(**arguments)
        assert request.preview() is None and request.progress == (0, 6)
        gate.wait()
        while not request.done():
            step, (done, total) = request.preview(), request.progress
            assert total == 6 and (step is None) == (done == 0)
            if step is not None:
                assert step.tick == done - 1 and step.done.tolist() == states[step.tick].done.tolist()
                assert torch.equal(step.x, states[step.tick].x)
                step.x.zero_()  # it is a copy
            gate.let(1)
        gate.open()
    assert torch.equal(request.result(), states[-1].x) and torch.equal(request.preview().x, states[-1].x)


def test_predicted_data_is_what_the_step_was_taken_with():
    """Asked for while a call is on its way, it is that call's; a hook of the sampler sees the same (P4)."""
    seen, later = [], []

    class Look(Hook):
        def after_prediction(self, carry, denoised):
            seen.append(denoised.clone())
            return denoised

    arguments = dict(shape=(2, *SHAPE), solver=["dpmpp-2m", "euler-a"], steps=[4, 2], guidance=[3.0, 1.0], negative={})
    sampler_of().sample(**arguments, hooks=[Look()])
    table = sampler_of().plan(1, solver="ddim", steps=1).tables[0]
    raw = replace(
        table, solver=replace(table.solver, history="raw", exact=frozenset())
    )  # as `from_scheduler` makes them
    gate = Gate(close=1)
    with Engine(sampler_of(gate)) as engine:
        request = engine.submit(**arguments)
        with pytest.raises(ValueError, match="does not know"):
            engine.submit((1, 3), solver=raw).denoised()
        gate.wait()
        asking = threading.Thread(target=lambda: later.append(request.denoised(SECONDS)))
        asking.start()
        while not request.asked:
            time.sleep(0.001)
        gate.open()
        asking.join()
    assert torch.allclose(later[0], seen[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(request.denoised(), request.result())


def test_cancelling_frees_the_rows_at_once_and_leaves_the_bits_of_others():
    gate, arguments = Gate(), dict(shape=(1, *SHAPE), solver="dpmpp-2m-sde", steps=8)
    states = list(sampler_of().step(**arguments, seed=1))
    with Engine(sampler_of(gate), max_rows=2) as engine:
        requests = [engine.submit(**arguments, seed=seed) for seed in range(4)]
        gate.wait()
        gate.let(3)
        assert requests[1].cancel() and requests[3].cancel() and requests[3].done()
        gate.let(2)  # the call that was on its way, and the next
        assert requests[1].cancelled() and requests[2].progress.done == 1
        gate.open()
        assert requests[0].result(SECONDS) is not None and not requests[0].cancel()
    with pytest.raises(Cancelled) as caught:
        requests[1].result()
    step = caught.value.step
    assert step.tick == requests[1].progress.done - 1 >= 2 and torch.equal(step.x, states[step.tick].x)
    with pytest.raises(Cancelled, match="before the first call"):
        requests[3].result()
    for seed in (0, 2):
        assert torch.equal(requests[seed].result(), sampler_of().sample(**arguments, seed=seed))
    assert (engine.report().finished, engine.report().cancelled) == (2, 2)


def test_nan_and_errors_of_the_network_fail_only_the_request_that_has_them():
    def net(x, t, shift):
        if bool((shift == 7.0).any()) and float(t[0]) < 600.0:
            raise KeyError("seven")
        bad = (shift == 13.0) & (t < 400.0)
        return torch.where(bad.view(-1, 1, 1, 1), torch.nan, elementwise_net(x, t, shift))

    arguments = lambda n: dict(shape=(1, *SHAPE), steps=6, seed=n, cond={"shift": torch.tensor([float(n)])})
    with Engine(sampler_of(net)) as engine:
        requests = {n: engine.submit(**arguments(n)) for n in (1, 7, 13, 2)}
        unguarded = engine.submit(**arguments(13), guard=False)
    for n in (1, 2):
        assert torch.equal(requests[n].result(), sampler_of().sample(**arguments(n)))
    with pytest.raises(KeyError, match="seven"):
        requests[7].result()
    with pytest.raises(NonFiniteError) as alone:
        sampler_of(net).sample(**arguments(13))
    with pytest.raises(NonFiniteError) as served:
        requests[13].result()
    assert str(served.value) == str(alone.value) and unguarded.result().isnan().any()
    assert (engine.report().finished, engine.report().failed) == (3, 2)


def test_a_network_that_cannot_prepare_a_schedule_fails_the_request_and_no_other():
    class Net:
        def prepare_schedule(self, x, times, **cond):
            prepared.append(tuple(times.shape))
            if len(times) == 4:
                raise MemoryError

        def __call__(self, x, t, **cond):
            return elementwise_net(x, t, **cond)

    prepared, arguments = [], dict(solver="ddim", guidance=2.0, negative={})
    with Engine(sampler_of(Net()), max_rows=2) as engine:
        requests = [engine.submit((2, *SHAPE), steps=steps, **arguments) for steps in (3, 4, 5)]
    assert prepared == [(3, 4), (4, 4), (5, 4)]  # calls, and rows of both branches
    with pytest.raises(MemoryError):
        requests[1].result()
    for steps, request in ((3, requests[0]), (5, requests[2])):
        assert torch.equal(request.result(), sampler_of().sample((2, *SHAPE), steps=steps, **arguments))


def test_samples_of_a_gaussian_are_those_of_the_closed_form():
    """Data N(m, s^2) per request, whose best denoiser at noise level t is (s^2 x + t^2 m) / (s^2 + t^2).

    Along the ODE (x - m) / sqrt(s^2 + t^2) stays what it is; stochastic solvers keep mean and variance only.
    """
    process, count = VE(t_min=0.01, edm=False), 5000
    sampler = Sampler(
        lambda x, t, m, s: (s**2 * x + t[:, None] ** 2 * m) / (s**2 + t[:, None] ** 2),
        prediction="data",
        process=process,
    )
    cases = [("dpmpp-2m", -1.0, 0.3), ("heun", 0.5, 1.0), ("unipc-2", 2.0, 0.6), ("dpmpp-2m-sde", 1.0, 0.5)]
    settings = [dict(solver=solver, steps=60, final="zero") for solver, _, _ in cases]
    given = [{"m": torch.tensor([[m]]), "s": torch.tensor([[s]])} for _, m, s in cases]
    with Engine(sampler) as engine:
        requests = [
            engine.submit((1, count), seed=n, cond=one, **its)
            for n, (one, its) in enumerate(zip(given, settings, strict=True))
        ]
    for n, (request, (solver, m, s)) in enumerate(zip(requests, cases, strict=True)):
        x, plan = request.result(), sampler.plan(1, **settings[n])
        start = sampler.initial_state((1, count), plan, n)
        exact = m + (start - m) * s / (s**2 + plan.tables[0].start.sigma ** 2) ** 0.5
        # the error of 60 steps of order two
        assert (x - exact).abs().max() < 0.02 * s or "sde" in solver, solver
        assert (
            abs(x.mean() - m) < 4 * s / count**0.5 + 0.01 * s and abs(x.std() / s - 1) < 4 / (2 * count) ** 0.5 + 0.02
        )


@pytest.mark.gpu
def test_on_a_gpu_requests_get_the_bits_of_each_alone():
    sampler, choose = sampler_of(), random.Random(0)
    settings = [dict(solver=choose.choice(list(SOLVERS)), steps=choose.randint(3, 12), seed=n) for n in range(12)]
    with Engine(sampler, max_rows=5, device="cuda") as engine:
        requests = [engine.submit((1, 4, 16, 16), **one) for one in settings]
    for one, request in zip(settings, requests, strict=True):
        assert torch.equal(request.result(), sampler.sample((1, 4, 16, 16), device="cuda", **one)), one
