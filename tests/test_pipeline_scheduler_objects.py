"""Fast schedulers as objects: attributes, copies, files, pipelines, settings that change, and the record of what ran."""

import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from scheduler_settings import SD

import fastdiff
from fastdiff.pipeline import fast_class, schedulers_runner

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; these are its schedulers")
from scheduler_pairs import SHAPE, STEPS, difference, make, network, run, start, worst  # noqa: E402

logging.getLogger("diffusers").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

MULTI = [
    ("DPMSolverMultistepScheduler", {**SD, "solver_order": 3}),
    ("UniPCMultistepScheduler", SD),
    ("UniPCMultistepScheduler", {**SD, "solver_order": 3}),
    ("SASolverScheduler", {}),
    ("HeunDiscreteScheduler", SD),
    ("KDPM2AncestralDiscreteScheduler", SD),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
    ("IPNDMScheduler", {}),
    ("LMSDiscreteScheduler", SD),
    ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3}),
]


def advance(scheduler, x, first, last, generator=None):
    """Steps first..last - 1 of a schedule that is set."""
    for t in scheduler.timesteps[first:last]:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        draws = generator is not None and type(scheduler).__name__ in (
            "SASolverScheduler",
            "KDPM2AncestralDiscreteScheduler",
        )
        x = scheduler.step(network(scaled, float(t)), t, x, **({"generator": generator} if draws else {})).prev_sample
    return x


def generator():
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("name, config", MULTI)
def test_attributes_are_those_of_the_scheduler(name, config):
    plain = make(name, config)
    fast = fastdiff.as_fast(plain)
    states = []
    for scheduler in (plain, fast):
        scheduler.set_timesteps(STEPS)
        advance(scheduler, start(scheduler), 0, 13, generator())
        states.append({k: getattr(scheduler, k) for k in vars(plain) if k not in ("ets", "last_noise")})
    for key, want in states[0].items():
        compare(key, states[1][key], want, name)


def compare(key, got, want, name):
    if isinstance(want, (list, tuple)) and not isinstance(got, str):
        assert len(got) == len(want), key
        for a, b in zip(got, want, strict=True):
            compare(key, a, b, name)
    elif isinstance(want, torch.Tensor) and want.shape == SHAPE:
        # only the mix of last state and last noise is kept of SA-Solver
        assert (name == "SASolverScheduler" and key == "last_sample") or difference(got, want) < 1e-5, key
    elif isinstance(want, torch.Tensor):
        assert torch.allclose(torch.as_tensor(got), want, rtol=0, atol=0, equal_nan=True), key
    elif isinstance(want, (int, float, str, type(None))):
        assert got == want, key


@pytest.mark.parametrize("how", ["gradients", "deepcopy", "pickle", "as_fast", "attribute"])
@pytest.mark.parametrize("name, config", MULTI)
def test_a_run_can_be_interrupted_anywhere(name, config, how):
    plain, fast = make(name, config), fastdiff.as_fast(make(name, config))
    if name == "SASolverScheduler" and how == "pickle":
        pytest.skip("SASolverScheduler keeps a lambda, so that no copy of it can be pickled")
    for scheduler in (plain, fast):
        scheduler.set_timesteps(STEPS)
    n = len(plain.timesteps)
    want = advance(plain, start(plain), 0, n, generator())
    for cut in (1, 2, 9):
        fast.set_timesteps(STEPS)
        g = generator()
        x = advance(fast, start(fast), 0, cut, g)
        other = fast
        if how == "gradients":
            with torch.enable_grad():
                x = advance(fast, x.requires_grad_(), cut, cut + 2, g).detach()
        elif how == "attribute":  # what a user sets counts, even if it is what was there
            for key in ("model_outputs", "ets", "derivatives", "last_sample", "sample"):
                if hasattr(fast, key):
                    setattr(fast, key, copy.deepcopy(getattr(fast, key)))
        else:
            other = {"deepcopy": copy.deepcopy, "pickle": _pickled, "as_fast": fastdiff.as_fast}[how](fast)
        x = advance(other, x, cut + 2 * (how == "gradients"), n, g)
        assert difference(x, want) < 1e-5, cut


def _pickled(scheduler):
    return pickle.loads(pickle.dumps(scheduler))


def test_a_run_counts_what_left_the_kernel_and_why():
    fast = fastdiff.as_fast(make("UniPCMultistepScheduler", SD))
    fast.set_timesteps(STEPS)
    x = advance(fast, start(fast), 0, 5)
    with torch.enable_grad():
        advance(fast, x.requires_grad_(), 5, 7)
    report = fast.fastdiff_report()
    assert report.fused == 5 and dict(report.stock) == {"gradients are recorded": 2}
    assert (
        str(report).splitlines()[0] == "UniPCMultistepScheduler: 5 steps on the fused kernel, 2 on diffusers' own code"
    )


@pytest.mark.parametrize(
    "name, config, reason",
    [
        ("DDIMScheduler", {"thresholding": True}, "not an affine function"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "not an affine function"),
        ("FlowMatchLCMScheduler", {}, "remembers the sample's size"),
        ("DPMSolverSDEScheduler", {}, "Brownian tree"),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_the_scheduler(name, config, reason):
    pytest.importorskip("torchsde") if "SDE" in name else None
    plain = make(name, config)
    if "SDE" in name:
        plain.register_to_config(noise_sampler_seed=1)
        plain.noise_sampler_seed = 1
    fast = fastdiff.as_fast(plain)
    assert worst(run(fast), run(plain)) == 0.0
    report = fast.fastdiff_report()
    assert report.fused == 0 and all(re.search(reason, text) for text in report.stock)


def test_a_setting_that_was_given_up_is_tried_again_when_it_changes():
    fast = fastdiff.as_fast(make("DPMSolverMultistepScheduler", {**SD, "thresholding": True}))
    run(fast)
    fast.register_to_config(thresholding=False)
    run(fast)
    assert fast.fastdiff_report().fused == STEPS and fast.fastdiff_report().stock.total() == STEPS


def test_errors_are_the_schedulers_own():
    fast = fastdiff.as_fast(make("EulerDiscreteScheduler", SD))
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="integer indices"):
        fast.step(x, 3, x)
    unset = fastdiff.as_fast(make("DPMSolverMultistepScheduler", SD))
    with pytest.raises(ValueError, match="set_timesteps"):
        unset.step(x, 3, x)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fast.step(x, fast.timesteps[0], x, nothing=1)
    with pytest.raises(ValueError, match="noise must be"):
        fastdiff.as_fast(fast, noise="brown")


def test_a_vector_of_timesteps_that_is_the_schedulers_own():
    pair, results = [make("DDPMWuerstchenScheduler", {})], []
    pair.append(fastdiff.as_fast(pair[0]))
    for scheduler in pair:
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0].expand(2)
        results.append(scheduler.step(torch.ones(SHAPE), t, torch.zeros(SHAPE), generator=generator()).prev_sample)
    assert torch.equal(*results)


def test_samples_that_stood_together_stay_together():
    fast, alone = (fastdiff.as_fast(make("DPMSolverMultistepScheduler", SD)) for _ in range(2))
    for scheduler in (fast, alone):
        scheduler.set_timesteps(4)
    x, m, t = torch.zeros(SHAPE), torch.ones(SHAPE), fast.timesteps
    want = alone.step(m, t[1], alone.step(m, t[0], x).prev_sample).prev_sample
    x = fast.step(m, t[0], x).prev_sample
    with pytest.raises(ValueError, match="right after set_timesteps"):
        fast.step(m, t[:2], x)
    assert torch.equal(fast.step(m, t[1].expand(2), x).prev_sample, want)
    again = fastdiff.as_fast(make("PNDMScheduler", {"skip_prk_steps": True}))
    again.set_timesteps(6)
    x = again.step(m, again.timesteps[[0, 0]], x).prev_sample
    with pytest.raises(ValueError, match="not possible here: these timesteps need different kinds"):
        for k in range(1, 6):
            x = again.step(m, again.timesteps[[k, 0]], x).prev_sample


def test_settings_may_change_between_steps():
    """Interleaved schedules, settings and begin indices, each compared with the scheduler after the same calls."""
    pair = [make("DPMSolverMultistepScheduler", SD), fastdiff.as_fast(make("DPMSolverMultistepScheduler", SD))]
    for change in (
        lambda s: s.set_timesteps(7),
        lambda s: s.set_timesteps(20),
        lambda s: s.register_to_config(solver_type="heun"),
        lambda s: s.register_to_config(solver_order=1),
        lambda s: (
            s.register_to_config(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
            s.set_timesteps(9),
        ),
        lambda s: (s.set_timesteps(9), s.set_begin_index(4)),
        lambda s: s.sigmas.mul_(1.01),
    ):
        for scheduler in pair:
            change(scheduler)
        begin = pair[0].begin_index or 0
        first = pair[0].step_index if pair[0].step_index is not None else begin
        n = min(3, len(pair[0].timesteps) - first)
        want, got = (advance(s, start(s), first, first + n) for s in pair)
        assert difference(got, want) < 3e-6
    assert not pair[1].fastdiff_report().stock


def test_plans_are_forgotten_when_there_are_many(monkeypatch):
    monkeypatch.setattr(schedulers_runner, "_ROWS", 30)
    monkeypatch.setattr(schedulers_runner, "_SCHEDULES", 2)
    plain = make("UniPCMultistepScheduler", SD)
    fast = fastdiff.as_fast(plain)
    for steps in (6, 9, 12, 7, 6, 15, 9):
        assert worst(run(fast, steps=steps), run(plain, steps=steps)) < 3e-6
    runner = vars(fast)["_fastdiff"]
    assert len(runner.roots) <= 2 and runner.memory.filled <= 45


def test_two_schedulers_do_not_share_anything():
    a, b = (fastdiff.as_fast(make("UniPCMultistepScheduler", SD)) for _ in range(2))
    want = run(a)[-1][0]
    a.set_timesteps(STEPS), b.set_timesteps(STEPS)
    x, y = start(a), start(b) * 0.5
    for i in range(STEPS):
        x, y = advance(a, x, i, i + 1), advance(b, y, i, i + 1)
    assert torch.equal(x, want) and not torch.equal(y, want)
    assert type(make("UniPCMultistepScheduler", SD)) is diffusers.UniPCMultistepScheduler


def test_returned_tensors_are_the_callers():
    fast = fastdiff.as_fast(make("UniPCMultistepScheduler", SD))
    for _ in range(2):
        results = run(fast)
        kept = [r[0].clone() for r in results]
        addresses = {r[0].data_ptr() for r in results}
        assert len(addresses) == STEPS and all(torch.equal(a, r[0]) for a, r in zip(kept, results, strict=True))
    spoiled = fastdiff.as_fast(make("UniPCMultistepScheduler", SD))
    spoiled.set_timesteps(STEPS)
    x = start(spoiled)
    for t in spoiled.timesteps:
        new = spoiled.step(network(x, float(t)), t, x).prev_sample
        x = new.clone()
        new.zero_()  # as callbacks do that reuse memory
    assert torch.equal(x, kept[-1])


@pytest.mark.parametrize("name, config", [("DDIMScheduler", {"clip_sample": False}), ("UniPCMultistepScheduler", SD)])
def test_names_files_and_switches(tmp_path, name, config):
    plain = make(name, config)
    fast = fastdiff.as_fast(plain)
    cls = type(fast)
    assert (cls.__name__, cls.__module__, cls.__qualname__) == (name, type(plain).__module__, name)
    assert isinstance(fast, type(plain)) and cls is fast_class(type(plain)) is fast_class(cls)
    assert fast.config == plain.config and str(cls.step.__doc__) == str(type(plain).step.__doc__)
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    texts = [json.loads((tmp_path / n / "scheduler_config.json").read_text()) for n in ("fast", "plain")]
    assert texts[0] == texts[1] and texts[0]["_class_name"] == name
    again = getattr(diffusers, name).from_pretrained(tmp_path / "fast")
    assert type(again) is type(plain) and worst(run(again), run(fast)) < 3e-6
    reopened = cls.from_pretrained(tmp_path / "plain")
    assert (
        type(reopened) is cls and worst(run(reopened), run(fast)) == 0.0 and reopened.fastdiff_report().fused == STEPS
    )
    switched = cls.from_config(diffusers.DDPMScheduler().config)
    assert isinstance(switched, cls)


REOPEN = """
import sys
sys.modules["fastdiff"] = None
import diffusers, torch
pipe = diffusers.DDIMPipeline.from_pretrained(sys.argv[1])
assert type(pipe.scheduler) is diffusers.DDIMScheduler
torch.save(torch.from_numpy(pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images), sys.argv[2])
"""


def test_a_saved_pipeline_opens_without_fastdiff(tmp_path):
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(**sizes, **blocks)
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.scheduler = fastdiff.as_fast(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert pipe.scheduler.fastdiff_report().fused == 4
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    command = [sys.executable, "-c", REOPEN, str(tmp_path / "pipe"), str(tmp_path / "images.pt")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    stock = torch.load(tmp_path / "images.pt", weights_only=True)
    assert float((torch.from_numpy(images) - stock).abs().max()) < 1e-5


def test_importing_fastdiff_does_not_import_diffusers():
    code = "import sys, fastdiff, fastdiff.pipeline; assert 'diffusers' not in sys.modules; fastdiff.as_fast"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_forced_backend_runs_the_reference():
    fast = fastdiff.as_fast(make("UniPCMultistepScheduler", SD))
    want = run(fast)
    with fastdiff.backend("reference"):
        got = run(fast)
    assert worst(got, want) < 1e-6 and fast.fastdiff_report().fused == 2 * STEPS


def test_compiled_callers_get_the_schedulers_own_step():
    fast = fastdiff.as_fast(make("EulerDiscreteScheduler", SD))
    fast.set_timesteps(STEPS)
    x = start(fast)
    want = advance(fast, x, 0, 1)
    fast.set_timesteps(STEPS)
    fast.scale_model_input(x, fast.timesteps[0])
    step = torch.compile(lambda m, t, x: fast.step(m, t, x, return_dict=False)[0], backend="eager")
    m = network(fast.scale_model_input(x, fast.timesteps[0]), float(fast.timesteps[0]))
    assert difference(step(m, fast.timesteps[0], x), want) < 1e-6
