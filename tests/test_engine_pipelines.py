"""The denoisers of diffusers pipelines behind an engine: equal to each request alone, and to the pipeline itself."""

import importlib.util
import threading

import pytest
import torch

import fastdiff
from fastdiff.ops import native

if native.cpu() is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs the compiled kernels and diffusers", allow_module_level=True)

from tiny_pipelines import TINY, denoiser, one_call

pytestmark = pytest.mark.slow
_SHARED = ("img_ids", "txt_ids")  # tensors without samples


def served(pipe, call: dict, ready: threading.Event):
    """A sampler's network out of a pipeline's denoiser, and the shape of its state: what has no rows is fixed.

    Its calls wait until everybody is `ready`.
    """
    net = denoiser(pipe)
    state = "sample" if "sample" in call else "hidden_states"
    fixed = {
        name: value for name, value in call.items() if name in _SHARED or not isinstance(value, (torch.Tensor, dict))
    }
    scale = 1 / 1000 if "img_ids" in call else 1

    def predict(x, t, **cond):
        assert ready.wait(60)
        out = net(**fixed, **cond, **{state: x, "timestep": t * scale})[0]
        return out[:, : x.shape[1]]  # learned variances are not the sampler's

    return predict, call[state].shape


def conditioning(call: dict) -> dict:
    own = ("sample", "hidden_states", "timestep", *_SHARED)
    return {name: value for name, value in call.items() if isinstance(value, (torch.Tensor, dict)) and name not in own}


@pytest.mark.parametrize("name", TINY)
def test_four_threads_on_one_pipeline_get_the_bits_of_each_alone(name):
    """Accelerated so that a row does not depend on its batch, with calls of all rows there are."""
    tiny = TINY[name]
    pipe = fastdiff.accelerate(tiny.build(), deterministic="batch")
    calls = [one_call(pipe, tiny, rows=1, run=run) for run in range(4)]
    ready = threading.Event()
    net, shape = served(pipe, calls[0], ready)
    sampler = fastdiff.Sampler(net, prediction="noise", model_dtype=torch.float32)
    solvers, results = ["dpmpp-2m", "euler-a", "unipc-2", "ddim"], [[] for _ in calls]

    def settings(user: int, k: int) -> dict:
        cond = conditioning(calls[user])
        guided = dict(guidance=3.0, negative=conditioning(calls[user - 1])) if k else {}
        return dict(shape=shape, cond=cond, solver=solvers[user], steps=3 + user + k, seed=10 * user + k, **guided)

    def work(user: int) -> None:
        results[user] += [engine.submit(**settings(user, k)) for k in range(2)]

    with fastdiff.Engine(sampler, max_rows=6) as engine:
        threads = [threading.Thread(target=work, args=(user,)) for user in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ready.set()
    assert engine.report().rows_per_step > 2
    for user, requests in enumerate(results):
        for k, request in enumerate(requests):
            assert torch.equal(request.result(), sampler.sample(**settings(user, k))), (user, k)


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_engine_gives_the_latents_of_the_pipeline(accelerated):
    """Stable Diffusion's own scheduler as a table, prompts encoded by the pipeline, latents given."""
    pipe = TINY["SD1.5"].build()
    if accelerated:
        fastdiff.accelerate(pipe)
    shape, prompts = (1, 4, 8, 8), ["a fox", "a hen in the snow"]
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    call = dict(num_inference_steps=5, guidance_scale=4.0, output_type="latent", height=16, width=16)
    expected = [pipe(prompt, latents=x, **call).images for prompt, x in zip(prompts, latents, strict=True)]

    table = fastdiff.from_scheduler(pipe.scheduler, 5)
    net = lambda x, t, text: pipe.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
    with torch.no_grad():
        encoded = [pipe.encode_prompt(prompt, "cpu", 1, True) for prompt in prompts]
    with fastdiff.Engine(fastdiff.Sampler(net, model_dtype=torch.float32)) as engine:
        requests = [
            engine.submit(
                x=x * pipe.scheduler.init_noise_sigma,
                cond={"text": own},
                negative={"text": other},
                solver=table,
                guidance=4.0,
            )
            for x, (own, other) in zip(latents, encoded, strict=True)
        ]
    for request, picture in zip(requests, expected, strict=True):
        assert (request.result() - picture).abs().max() < 1e-5 * picture.abs().max()
