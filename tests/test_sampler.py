"""The sampling loop: rows alone against rows together, hooks, states, errors."""

import threading

import numpy as np
import pytest
import torch

from fastdiff.carry import Hook
from fastdiff.guidance import CFG
from fastdiff.loop import NonFiniteError
from fastdiff.plain import plain_sample
from fastdiff.process import VE, Flow, MeanReverting, VPLinear
from fastdiff.sampler import Cancelled, Sampler
from fastdiff.solvers import SOLVERS

SHAPE = (2, 3, 5)  # of a sample; odd on purpose


def elementwise_net(x, t, shift=None):
    """A denoiser of elementwise operations: its bits cannot depend on the batch."""
    column = lambda v: v.view(-1, *[1] * (x.dim() - 1))
    out = torch.tanh(x * 0.3) * (1.0 + column(t) / 2000.0)
    return out if shift is None else out + 0.1 * column(shift)


def conditions(rows):
    return {"cond": {"shift": torch.tensor([float(r) for r in rows])}, "negative": {"shift": -torch.ones(len(rows))}}


def every_solver(count):
    names = list(SOLVERS)
    return [names[i % len(names)] for i in range(count)]


@pytest.mark.parametrize("trial", range(4))
def test_mixed_batch_equals_each_row_alone_bit_for_bit(trial):
    random = np.random.default_rng(trial)
    B = int(random.integers(2, 17))
    solvers = list(random.choice(list(SOLVERS), B))
    steps = [int(n) for n in random.integers(6, 13, B)]
    guidance = [float(w) for w in random.choice([1.0, 1.5, 4.0], B)]
    seeds = [int(s) for s in random.integers(0, 2**62, B)]
    sampler = Sampler(elementwise_net, prediction="v", process=VPLinear())
    mixed = sampler.sample(
        (B, *SHAPE), solver=solvers, steps=steps, guidance=guidance, seed=seeds, **conditions(range(B))
    )
    assert mixed.isfinite().all()
    for b in range(B):
        alone = sampler.sample(
            *[(1, *SHAPE)], solver=solvers[b], steps=steps[b], guidance=guidance[b], seed=[seeds[b]], **conditions([b])
        )
        assert torch.equal(alone[0], mixed[b]), (solvers[b], steps[b], guidance[b])


@pytest.mark.slow
def test_batch_invariance_64_trials_with_a_network():
    """A network whose kernels depend on the batch: micro_batch=1 makes every sample independent of it; without, it differs."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(30, 512), torch.nn.SiLU(), torch.nn.Linear(512, 30))
    call = lambda x, t: net(x).view_as(x)
    random, differing = np.random.default_rng(0), 0
    for _ in range(64):
        B, needle = int(random.integers(2, 17)), int(random.integers(0, 2**31))
        place = int(random.integers(0, B))
        seeds = [int(s) for s in random.integers(0, 2**31, B)]
        seeds[place] = needle
        results = []
        for micro in (1, None):
            sampler = Sampler(call, prediction="data", process=VPLinear(), micro_batch=micro)
            alone = sampler.sample((1, *SHAPE), seed=[needle], steps=8)
            results.append(torch.equal(sampler.sample((B, *SHAPE), seed=seeds, steps=8)[place], alone[0]))
        assert results[0]
        differing += not results[1]
    assert differing > 0, "the inverse control must differ, or this test shows nothing"


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_solver_matches_plain_torch(name):
    solver = SOLVERS[name]
    sampler = Sampler(elementwise_net, prediction="v", process=VPLinear())
    settings = {"solver": name, "steps": 8, "guidance": 3.0}
    plan = sampler.plan(2, **settings)
    if plan.coef[:, 16:18].any():  # stochastic: only the noise-free part has a plain counterpart
        assert torch.isfinite(sampler.sample((2, *SHAPE), **settings, **conditions([0, 1]))).all()
        return
    ours = sampler.sample((2, *SHAPE), **settings, **conditions([0, 1]))
    start = sampler.initial_state((2, *SHAPE), plan, 0)
    exact = plain_sample(elementwise_net, plan, start.double(), *conditions([0, 1]).values())
    plain = plain_sample(elementwise_net, plan, start, *conditions([0, 1]).values())
    bound = 2.0 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (ours - exact).abs().max() <= bound, solver.name


def test_same_seed_same_bits_for_any_thread_count():
    sampler = Sampler(elementwise_net, prediction="v", process=VPLinear())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(sampler.sample((3, 4, 64, 64), solver="ddim", steps=5, seed=7))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_guidance_interval_and_per_step_scales_are_the_hand_written_combination():
    process = Flow()
    sampler = Sampler(elementwise_net, prediction="flow", process=process)
    guidance = CFG(scale=(2.0, 5.0, 3.0), interval=(0.3, 0.8))
    plan = sampler.plan(1, solver="flow-euler", steps=6, guidance=guidance)
    x = sampler.initial_state((1, *SHAPE), plan, 3).double()
    cond, negative = conditions([1]).values()
    levels = [row.at for row in plan.tables[0].rows] + [plan.tables[0].end]
    calls = 0
    for i, (at, to) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        scale = (2.0, 5.0, 3.0)[min(i, 2)] if 0.3 <= at.t / process.t_max <= 0.8 else 1.0
        time = torch.tensor([at.time])
        u = elementwise_net(x, time, **cond)
        calls += 1 + (scale != 1.0)
        if scale != 1.0:
            u = scale * u + (1.0 - scale) * elementwise_net(x, time, **negative)
        x = x + (to.t - at.t) * u
    ours = sampler.sample(
        (1, *SHAPE), solver="flow-euler", steps=6, guidance=guidance, seed=3, cond=cond, negative=negative
    )
    assert plan.calls == calls
    torch.testing.assert_close(ours.double(), x, rtol=0, atol=2e-6 * float(x.abs().max()))


def test_state_may_be_a_pytree_and_leaves_get_different_noise():
    net = lambda x, t: {"image": 0.1 * x["image"], "token": 0.2 * x["token"]}
    x = {"image": torch.randn(2, 3), "token": torch.randn(2, 4, 2)}
    both = Sampler(net).sample(x=x, solver="ddim", steps=4)
    one = Sampler(lambda x, t: 0.2 * x).sample(x=x["token"], solver="ddim", steps=4)
    assert torch.equal(both["token"], one)
    noisy = Sampler(lambda x, t: (0.0 * x[0], 0.0 * x[1])).sample(
        x=(torch.zeros(1, 64), torch.zeros(1, 64)), solver="ddpm", steps=4
    )
    assert abs(float(torch.corrcoef(torch.stack([n[0] for n in noisy]))[0, 1])) < 0.5


def test_known_endpoint_reaches_the_model_and_the_state():
    """Mean-reverting process with the exact denoiser of a point mass at 0.4: every step count ends there."""
    sampler = Sampler(lambda x, t: torch.full_like(x, 0.4), prediction="data", process=MeanReverting(sigma_max=0.2))
    u = torch.full((2, 3), -0.5)
    out = sampler.sample((2, 3), aux=u, solver="ddim", steps=3)
    torch.testing.assert_close(out, torch.full((2, 3), 0.4))
    with pytest.raises(ValueError, match="known endpoint"):
        sampler.sample((2, 3), solver="ddim", steps=3)


def test_edm_scales_the_model_input():
    seen = []

    def net(x, t):
        seen.append((float(x.std()), float(t[0])))
        return torch.zeros_like(x)

    Sampler(net, prediction="edm", process=VE()).sample((1, 4096), solver="euler", steps=4, spacing="karras")
    sigma = np.exp(4 * np.array([t for _, t in seen]))
    # with F = 0 the denoiser is c_skip x; the input of the first call has unit deviation
    assert seen[0][0] == pytest.approx(1.0, abs=0.05)
    assert sigma[0] == pytest.approx(80.0, rel=1e-6)


class Recorder(Hook):
    """Overrides every point and notes the order."""

    def __init__(self):
        self.points = []

    def before_step(self, carry):
        self.points.append("P0")

    def branches(self, carry, weights):
        self.points.append("P1")
        return weights

    def statistics(self, carry, outputs):
        self.points.append("P2")
        assert len(outputs) == 2 and outputs[0].shape == carry.x.shape

    def coefficients(self, carry, coef):
        self.points.append("P3")
        return coef

    def after_prediction(self, carry, denoised):
        self.points.append("P4")
        return denoised

    def after_step(self, carry):
        self.points.append("P5")

    def group(self, carry):
        self.points.append("P6")


@pytest.mark.parametrize("name", ["dpmpp-2m", "unipc", "deis", "ddim"])
def test_hooks_run_in_order_and_passive_hooks_change_nothing(name):
    sampler = Sampler(elementwise_net, prediction="v", process=VPLinear())
    settings = dict(solver=name, steps=5, guidance=2.0, **conditions([0, 1]))
    plain, hook = sampler.sample((2, *SHAPE), **settings), Recorder()
    hooked = sampler.sample((2, *SHAPE), hooks=[hook], **settings)
    assert hook.points == [f"P{i}" for i in range(7)] * sampler.plan(2, solver=name, steps=5).ticks
    torch.testing.assert_close(hooked, plain, rtol=2e-4, atol=2e-4)


def test_an_edited_prediction_is_what_the_solver_uses():
    class Constant(Hook):
        def after_prediction(self, carry, denoised):
            return torch.full_like(denoised, 0.25)

    out = Sampler(elementwise_net, prediction="v", process=VPLinear()).sample(
        (2, *SHAPE), solver="dpmpp-2m", steps=6, hooks=[Constant()]
    )
    torch.testing.assert_close(out, torch.full_like(out, 0.25), rtol=0, atol=1e-5)


def test_a_hook_may_drop_a_branch():
    class Never(Hook):
        def branches(self, carry, weights):
            return weights * [1.0, 0.0]

    calls = []

    def net(x, t, shift):
        calls.append(x.shape[0])
        return elementwise_net(x, t, shift)

    sampler = Sampler(net, prediction="v", process=VPLinear())
    inputs = conditions([0, 1])
    out = sampler.sample((2, *SHAPE), solver="ddim", steps=3, guidance=2.0, hooks=[Never()], **inputs)
    assert calls == [2, 2, 2]
    # 2 * conditional + 0 * negative, as a network of its own
    twice = Sampler(
        lambda x, t: 2.0 * elementwise_net(x, t, inputs["cond"]["shift"]), prediction="v", process=VPLinear()
    )
    torch.testing.assert_close(out, twice.sample((2, *SHAPE), solver="ddim", steps=3))


def test_a_hook_may_give_every_token_its_own_time():
    seen = []

    class Later(Hook):
        def before_step(self, carry):
            carry.time = torch.full((2, 5), 100.0) + torch.arange(5.0)

    def net(x, t):
        seen.append(t)
        return x * 0.0

    Sampler(net, prediction="v", process=VPLinear()).sample((2, 5, 3), solver="ddim", steps=2, hooks=[Later()])
    assert [tuple(t.shape) for t in seen] == [(2, 5)] * 2 and float(seen[0][1, 4]) == 104.0


def test_gather_moves_state_history_and_extras_together():
    class Swap(Hook):
        def group(self, carry):
            if carry.tick == 3:
                carry.extras["w"] = torch.tensor([10.0, 20.0])
                carry.gather(torch.tensor([1, 0]))

    sampler = Sampler(elementwise_net, prediction="v", process=VPLinear())
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    swapped = sampler.sample(x=x, solver="dpmpp-3m", steps=7, hooks=[Swap()])
    plain = sampler.sample(x=x, solver="dpmpp-3m", steps=7)
    assert torch.equal(swapped, plain[[1, 0]])


def test_step_yields_every_state_and_the_last_is_the_sample():
    sampler = Sampler(elementwise_net, prediction="v", process=VPLinear())
    states = list(sampler.step((2, *SHAPE), solver="ddim", steps=[2, 4], seed=5))
    assert [state.done.tolist() for state in states] == [[False, False], [True, False], [True, False], [True, True]]
    assert torch.equal(states[-1].x, sampler.sample((2, *SHAPE), solver="ddim", steps=[2, 4], seed=5))
    assert torch.equal(states[1].x[0], states[3].x[0])


def test_cancel_gives_back_the_last_step_and_the_sampler_works_on():
    event = threading.Event()

    def net(x, t):
        if float(t[0]) < 500.0:
            event.set()
        return elementwise_net(x, t)

    sampler = Sampler(net, prediction="v", process=VPLinear())
    with pytest.raises(Cancelled) as caught:
        sampler.sample((1, *SHAPE), solver="ddim", steps=10, cancel=event)
    done = caught.value.step
    states = list(sampler.step((1, *SHAPE), solver="ddim", steps=10))
    assert torch.equal(done.x, states[done.tick].x) and done.tick < 9


@pytest.mark.parametrize("micro_batch, sizes", [(None, [27, 27, 26]), (30, [30, 30, 20]), (80, [80])])
def test_large_batches_reach_the_network_in_parts(micro_batch, sizes):
    seen = []

    def net(x, t, shift):
        seen.append(x.shape[0])
        return elementwise_net(x, t, shift)

    inputs = {**conditions(range(40)), "solver": "ddim", "guidance": 2.0, "seed": 3}
    parts = Sampler(net, prediction="v", process=VPLinear(), micro_batch=micro_batch)
    out = parts.sample((40, *SHAPE), steps=1, device="cpu", **inputs)
    whole = Sampler(elementwise_net, prediction="v", process=VPLinear(), micro_batch=1)
    assert seen == sizes and torch.equal(out, whole.sample((40, *SHAPE), steps=1, device="cpu", **inputs))


def test_nan_names_the_step():
    def net(x, t):
        return x * float("nan") if float(t[0]) < 400.0 else elementwise_net(x, t)

    sampler = Sampler(net, prediction="v", process=VPLinear())
    with pytest.raises(NonFiniteError, match=r"after call \d+ of 10"):
        sampler.sample((1, *SHAPE), solver="ddim", steps=10)


def test_half_precision_models_keep_a_float32_state():
    seen = set()

    def net(x, t):
        seen.add(x.dtype)
        return torch.tanh(x * 0.3)

    low = Sampler(net, prediction="v", process=VPLinear(), model_dtype=torch.bfloat16)
    out = low.sample((2, 4096), solver="dpmpp-2m", steps=8)
    full = Sampler(net, prediction="v", process=VPLinear()).sample((2, 4096), solver="dpmpp-2m", steps=8)
    assert seen == {torch.bfloat16, torch.float32} and out.dtype == torch.float32
    error = (out - full).abs().mean() / full.abs().mean()
    assert 1e-5 < error < 2e-2


@pytest.mark.gpu
def test_a_captured_step_equals_the_eager_one():
    sampler = Sampler(elementwise_net, prediction="v", process=VPLinear())
    arguments = dict(solver=["dpmpp-2m", "euler-a"], steps=9, seed=3, device="cuda")
    eager = sampler.sample((2, 4, 64, 64), **arguments)
    assert torch.equal(sampler.sample((2, 4, 64, 64), graph=True, **arguments), eager)
