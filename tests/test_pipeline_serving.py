"""Many calls of one pipeline at a time: each as if it were the only one."""

import importlib.util
import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

import fastdiff
from fastdiff.ops import native

if native.cpu() is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs the compiled kernels and diffusers", allow_module_level=True)

from tiny_pipelines import TINY, denoiser

from fastdiff.engine import EngineReport
from fastdiff.pipeline.joint_calls import JointCalls

pytestmark = pytest.mark.slow


def call_of(tiny, user: int, **others) -> dict:
    """Arguments of a user's call: own noise, own number of steps, own guidance."""
    own = {"num_inference_steps": 3 + user % 3, "guidance_scale": 2.0 + user}
    seeded = {"generator": torch.Generator().manual_seed(user), "output_type": "latent", "return_dict": False}
    return tiny.arguments | own | seeded | others


@pytest.mark.parametrize("name", TINY)
def test_calls_at_the_same_time_have_the_bits_of_each_alone(name):
    tiny = TINY[name]
    pipe = fastdiff.accelerate(tiny.build(), deterministic="batch")
    expected = [torch.as_tensor(pipe(**call_of(tiny, user))[0]) for user in range(6)]
    before = set(vars(pipe)), set(vars(denoiser(pipe)))
    # other threads come to their next call while one runs
    slow = denoiser(pipe).register_forward_pre_hook(lambda *_: time.sleep(0.02))
    with fastdiff.PipelineEngine(pipe, threads=4) as engine:
        futures = [engine.submit(**call_of(tiny, user)) for user in range(6)]
    slow.remove()
    for future, latents in zip(futures, expected, strict=True):
        assert torch.equal(torch.as_tensor(future.result()[0]), latents)
    report = engine.report()
    assert report.rows_per_step > 1, "no call was made for two users"
    assert (report.finished, report.waiting, report.running) == (6, 0, 0)
    assert (set(vars(pipe)), set(vars(denoiser(pipe)))) == before


def test_errors_stay_with_their_call():
    """Not accelerated, so that what joins differs by rounding. One asks for a class that there is not."""
    tiny = TINY["DiT"]
    pipe = tiny.build()
    seen = []

    def look(_, args, kwargs):
        seen.append(kwargs["timestep"].shape)

    with torch.no_grad():
        expected = [torch.as_tensor(pipe(**call_of(tiny, user))[0]) for user in range(4)]
        wrong = dict(call_of(tiny, 4), class_labels=[5000])
        with fastdiff.PipelineEngine(pipe, threads=5, max_rows=4) as engine:
            handle = denoiser(pipe).register_forward_pre_hook(look, with_kwargs=True)
            futures = [engine.submit(**call_of(tiny, user)) for user in range(4)]
            failing = engine.submit(**wrong)
        handle.remove()
    for future, latents in zip(futures, expected, strict=True):
        assert (torch.as_tensor(future.result()[0]) - latents).abs().max() < 1e-5 * latents.abs().max()
    with pytest.raises(IndexError):
        failing.result()
    assert max(shape[0] for shape in seen) == 4
    assert (engine.report().finished, engine.report().failed) == (4, 1)


def test_cancelling_ends_a_call_before_its_next_step_and_leaves_the_others():
    tiny = TINY["DiT"]
    pipe = fastdiff.accelerate(tiny.build(), deterministic="batch")
    expected = torch.as_tensor(pipe(**call_of(tiny, 1))[0])
    with fastdiff.PipelineEngine(pipe, threads=2) as engine:
        long = engine.submit(**call_of(tiny, 0, num_inference_steps=900))
        other = engine.submit(**call_of(tiny, 1))
        waiting = [engine.submit(**call_of(tiny, 2, num_inference_steps=900)) for _ in range(2)]
        assert torch.equal(torch.as_tensor(other.result(60)[0]), expected) and not other.cancel()
        assert waiting[1].cancel() and waiting[1].cancelled()
        while not long.calls:
            time.sleep(0.001)
        assert long.cancel()
        with pytest.raises(CancelledError):
            long.result(60)
        engine.shutdown(wait=False, cancel=True)
    assert long.cancelled() and 0 < long.calls < 900 and not other.cancelled()
    assert waiting[0].cancelled() and waiting[0].calls < 900
    engine.shutdown()
    assert (engine.report().finished, engine.report().cancelled) == (1, 3)
    with pytest.raises(RuntimeError, match="after shutdown"):
        engine.submit(**call_of(tiny, 0))


def test_the_first_who_finds_the_denoiser_free_calls_it_for_all_who_wait():
    """Two sizes wait while a call runs; those of one size are made as one call, and a large one goes alone."""
    inside, go, sizes = threading.Event(), threading.Event(), []

    class Slow(torch.nn.Module):
        def forward(self, sample, timestep, scale=1.0):
            sizes.append((tuple(sample.shape), timestep.tolist()))
            inside.set()
            assert go.wait(20)
            return (sample * scale + timestep.view(-1, 1),)

    report = EngineReport()
    joint, results = JointCalls(Slow(), lambda: None, 4, report.stepped), {}

    def user(n, shape, t, **others):
        results[n] = joint(torch.full(shape, float(n)), t, **others)[0]
        joint.leave()

    calls = [
        ((1, 3), 5.0),
        ((2, 3), torch.tensor([1.0, 2.0])),
        ((1, 7), torch.tensor(3.0)),
        ((1, 3), 4.0),
        ((6, 3), 7.0),
    ]
    threads = [threading.Thread(target=user, args=(n, *call)) for n, call in enumerate(calls)]
    threads.append(threading.Thread(target=user, args=(5, (1, 3), 4.0), kwargs={"scale": 2.0}))
    threads[0].start()
    assert inside.wait(20)
    for n, thread in enumerate(threads[1:], start=2):
        thread.start()
        while len(joint._waiting) < n - 1:
            time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join(20)
    assert [shape[0] for shape, _ in sizes] == [1, 3, 1, 6, 1] and sizes[1][1] == [1.0, 2.0, 4.0]
    for n, (shape, t) in enumerate([*calls, ((1, 3), 4.0)]):
        wanted = torch.full(shape, float(n)) * (2.0 if n == 5 else 1.0) + torch.as_tensor(t).float().view(-1, 1)
        assert torch.equal(results[n], wanted)
    assert (report.steps, report.rows, report.evaluations) == (5, 6, 12)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(TypeError, match="pipeline expected"):
        fastdiff.PipelineEngine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="threads must be an integer >= 1"):
        fastdiff.PipelineEngine(TINY["DiT"].build(), threads=0)
    for lossy in ({"cache": fastdiff.Cache(0.1)}, {"guidance": fastdiff.AdaptiveGuidance()}):
        with pytest.raises(ValueError, match="follow one run"):
            fastdiff.PipelineEngine(fastdiff.accelerate(TINY["DiT"].build(), **lossy))
