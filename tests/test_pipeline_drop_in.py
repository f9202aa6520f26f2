"""`accelerate` on whole diffusers pipelines: equal results, taken back without a trace, honest about what it did."""

import copy
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.ops import native

if native.cpu() is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs the compiled kernels and diffusers", allow_module_level=True)

from tiny_pipelines import TINY, denoiser, one_call, some_rows

LATENTS = 1e-5  # relative to the largest, in float32
# text encoders come from transformers, which takes seconds to import: one family without them in the quick run
FAMILIES = [name if name == "DiT" else pytest.param(name, marks=pytest.mark.slow) for name in TINY]


@pytest.fixture(autouse=True)
def one_thread():
    """Networks of a few thousand parameters only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _net(pipe, call: dict) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(pipe)(**call)[0]


def _modules(pipe) -> dict:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{inner}": module for name, part in parts.items() for inner, module in part.named_modules()}


def _traces(pipe) -> dict:
    """What the modules have besides their classes: attributes, hooks, processors and children, by identity."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "_buffers")
    look = lambda m: {kind: {key: id(value) for key, value in vars(m)[kind].items()} for kind in kinds}
    traces = {name: (set(vars(m)), look(m), id(vars(m).get("processor"))) for name, m in _modules(pipe).items()}
    return traces | {"pipe": set(vars(pipe))}


@pytest.mark.parametrize("name", FAMILIES)
def test_results_are_equal_and_undo_leaves_no_trace(name):
    tiny = TINY[name]
    pipe = tiny.build()
    latents, pictures = tiny(pipe), tiny(pipe, output_type="np")
    scheduler, traces = pipe.scheduler, _traces(pipe)
    weights = {key: copy.deepcopy(module.state_dict()) for key, module in _modules(pipe).items()}
    assert fastdiff.accelerate(pipe) is pipe
    assert _error(tiny(pipe), latents) < LATENTS
    assert (tiny(pipe, output_type="np") - pictures).abs().max() < 1e-4  # of 1
    assert not [line for line in fastdiff.report(pipe).fallbacks if "calls" in line or "steps" in line]
    assert fastdiff.undo(pipe) is pipe and pipe.scheduler is scheduler and _traces(pipe) == traces
    assert torch.equal(tiny(pipe), latents) and torch.equal(tiny(pipe, output_type="np"), pictures)
    for key, module in _modules(pipe).items():
        assert all(torch.equal(value, weights[key][own]) for own, value in module.state_dict().items()), key


@pytest.mark.parametrize("name", FAMILIES)
def test_repeated_runs_have_equal_bits_and_other_pipelines_are_not_touched(name):
    tiny = TINY[name]
    first, second = tiny.build(), tiny.build()
    expected = tiny(second)
    fastdiff.accelerate(first, "w8a8")
    once = tiny(first)
    assert torch.equal(tiny(first), once) and not torch.equal(once, expected)
    assert torch.equal(tiny(second), expected)


@pytest.mark.parametrize("mode, bound", [("exact", LATENTS), ("bf16", 0.06), ("w8a8", 0.2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_are_as_alone(name, mode, bound):
    """Every row at a timestep of its own, as samples that joined a running batch are."""
    tiny = TINY[name]
    pipe = tiny.build()
    call = one_call(pipe, tiny, rows=2)
    expected = _net(pipe, call)
    fastdiff.accelerate(pipe, mode, deterministic="batch")
    whole = _net(pipe, call)
    assert _error(whole, expected) < bound
    alone = fastdiff.accelerate(tiny.build(), mode, deterministic="batch")
    parts = [_net(alone, some_rows(call, slice(row, row + 1))) for row in range(len(whole))]
    if fastdiff.report(pipe).parts[_denoiser_name(pipe)].lowered:
        assert torch.equal(torch.cat(parts), whole)
    else:
        assert _error(torch.cat(parts), whole) < max(bound, LATENTS)


def _denoiser_name(pipe) -> str:
    return "unet" if "unet" in pipe.components else "transformer"


@pytest.mark.parametrize("name", FAMILIES)
def test_four_threads_get_what_one_gets(name):
    tiny = TINY[name]
    pipe = fastdiff.accelerate(tiny.build())
    calls = [one_call(pipe, tiny, rows=1 + run % 2, run=run) for run in range(4)]
    expected = [_net(pipe, call) for call in calls]
    results = [[] for _ in calls]

    def work(index: int) -> None:
        for _ in range(5):
            results[index].append(_net(pipe, calls[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, truth in zip(results, expected, strict=True):
        assert len(got) == 5 and all(torch.equal(one, truth) for one in got)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cancelled_run_leaves_nothing_behind(name):
    tiny = TINY[name]
    pipe = fastdiff.accelerate(tiny.build())
    expected, calls = tiny(pipe), []

    def stop(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = denoiser(pipe).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny(pipe)
    handle.remove()
    assert torch.equal(tiny(pipe), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if name not in ("PixArt-Sigma", "DiT")])
def test_callbacks_and_interrupt_see_the_same_as_before(name):
    tiny = TINY[name]
    pipe, seen = tiny.build(), []

    def look(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].clone()))
        pipe._interrupt = step == 1
        return tensors

    stock = tiny(pipe, callback_on_step_end=look)
    before, seen[:] = list(seen), []
    fastdiff.accelerate(pipe, strict=False)
    assert _error(tiny(pipe, callback_on_step_end=look), stock) < LATENTS
    assert [one[:2] for one in seen] == [one[:2] for one in before] and len(seen) == 2
    assert all(_error(one[2], two[2]) < LATENTS for one, two in zip(seen, before, strict=True))


_REOPEN = """
import sys
sys.meta_path.insert(0, type("Blocked", (), {"find_spec": lambda s, n, *a: (_ for _ in ()).throw(ImportError(n)) if n.split(".")[0] == "fastdiff" else None})())
sys.path.insert(0, %r)
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY
torch.set_num_threads(%d)
for name in %r:
    missing = dict(text_encoder=None, tokenizer=None) if name == "Sana" else {}
    pipe = DiffusionPipeline.from_pretrained(%r + "/" + name, **missing)
    pipe.set_progress_bar_config(disable=True)
    torch.save(TINY[name](pipe), %r + "/" + name + "/latents.pt")
assert "fastdiff" not in sys.modules
"""


@pytest.mark.slow
def test_saved_pipelines_open_without_fastdiff(tmp_path):
    expected = {}
    for name, tiny in TINY.items():
        pipe = tiny.build()
        expected[name] = tiny(pipe)
        fastdiff.accelerate(pipe, "w8a8")
        tiny(pipe)
        pipe.save_pretrained(tmp_path / name)
    folders = str(Path(__file__).parent), torch.get_num_threads(), list(TINY), str(tmp_path), str(tmp_path)
    done = subprocess.run([sys.executable, "-c", _REOPEN % folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, latents in expected.items():
        # not always by bits: products of torch may depend on where a loader puts the weights
        assert _error(torch.load(tmp_path / name / "latents.pt", weights_only=True), latents) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SD1.5", "SDXL", "FLUX", "DiT"])
def test_half_precision_is_no_further_from_the_truth_than_before(name, dtype):
    tiny = TINY[name]
    pipe = tiny.build()
    call = one_call(pipe, tiny, rows=1)
    truth = _net(pipe, call)
    halve = lambda value: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    call = {key: value if key == "timestep" else halve(value) for key, value in call.items()}
    if "added_cond_kwargs" in call and call["added_cond_kwargs"]:
        call["added_cond_kwargs"] = {key: halve(value) for key, value in call["added_cond_kwargs"].items()}
    pipe.to(dtype)
    stock = _net(pipe, call).float()
    fastdiff.accelerate(pipe)
    got = _net(pipe, call)
    assert got.dtype == dtype and _error(got.float(), truth) <= 2 * _error(stock, truth) + 1e-6
    assert tiny(pipe).isfinite().all() and tiny(pipe, output_type="np").isfinite().all()
    runs = fastdiff.report(pipe).parts[_denoiser_name(pipe)]
    assert runs.mode == ("bf16" if dtype == torch.bfloat16 else "exact")


def test_the_report_tells_every_part():
    tiny = TINY["DiT"]
    pipe = fastdiff.accelerate(tiny.build())
    tiny(pipe, steps=4)
    found = fastdiff.report(pipe)
    assert set(found.parts) == {"vae.decoder", "transformer", "scheduler"} and found.pipeline == "DiTPipeline"
    assert found.parts["transformer"].lowered and found.parts["transformer"].calls == {"fused": 4}
    assert found.parts["scheduler"].fused == 4 and not found.parts["scheduler"].stock
    assert found.bytes == sum(found.parts[name].bytes for name in ("vae.decoder", "transformer")) > 0
    assert "transformer: DiTTransformer2DModel, mode exact" in str(found) and "4 fused" in str(found)
    assert found.to_dict()["parts"]["scheduler"]["fused"] == 4
    pipe.scheduler = TINY["DiT"].build().scheduler
    pipe.transformer = TINY["DiT"].build().transformer
    assert set(fastdiff.report(pipe).left) == {"scheduler", "transformer"}
    replaced = pipe.scheduler
    assert fastdiff.undo(pipe).scheduler is replaced
    with pytest.raises(ValueError, match="DiTPipeline is not accelerated"):
        fastdiff.report(pipe)


@pytest.mark.slow
def test_a_part_of_an_accelerated_pipeline_may_be_given_another_mode():
    """The decoder in int8 too: lossier than the mode of the pipeline, hence asked for by itself."""
    tiny = TINY["DiT"]
    pipe = tiny.build()
    stock = tiny(pipe, output_type="np")
    pictures = tiny(fastdiff.accelerate(pipe, "w8a8"), output_type="np")
    fastdiff.accelerate(pipe.vae.decoder, "w8a8")
    assert 0 < (tiny(pipe, output_type="np") - pictures).abs().max() < 0.05  # of 1
    assert "vae.decoder: Decoder, mode w8a8" in str(fastdiff.report(pipe))
    assert torch.equal(tiny(fastdiff.undo(pipe), output_type="np"), stock)


def test_strict_forbids_what_runs_as_before():
    tiny = TINY["DiT"]
    pipe = fastdiff.accelerate(tiny.build(), strict=True)
    tiny(pipe)
    call = one_call(pipe, tiny, rows=1)
    with pytest.raises(RuntimeError, match="strict.*cross_attention_kwargs"):
        _net(pipe, call | {"cross_attention_kwargs": {"scale": 0.5}})
    pipe = tiny.build()
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *a: None)
    before = _traces(pipe)
    with pytest.raises(RuntimeError, match="strict.*not lowered.*hooks"):
        fastdiff.accelerate(pipe, strict=True)
    assert _traces(pipe) == before


def test_a_failure_leaves_the_pipeline_as_it_was():
    tiny = TINY["DiT"]
    pipe = tiny.build()
    before, scheduler, expected = _traces(pipe), pipe.scheduler, tiny(pipe)
    for settings, error in (
        (dict(quant="w8a8-static"), "calibrat"),
        (dict(quant="w3a3"), "w3a3"),
        (dict(mode="int3"), "unknown mode 'int3'"),
        (dict(deterministic="yes"), "unknown deterministic 'yes'; known are off, run, batch"),
    ):
        with pytest.raises(ValueError, match=error):
            fastdiff.accelerate(pipe, **settings)
        assert _traces(pipe) == before and pipe.scheduler is scheduler
    for option, hint in (("strikt", "did you mean 'strict'"), ("zzz", "known are mode, quant")):
        with pytest.raises(TypeError, match=f"unknown option '{option}'; {hint}"):
            fastdiff.accelerate(pipe, **{option: True})
    assert torch.equal(tiny(pipe), expected)


@pytest.mark.parametrize("quant", ["w8a8", pytest.param("w4a16", marks=pytest.mark.slow)])
def test_quantized_denoisers_are_taken_back(quant):
    tiny = TINY["DiT"]
    pipe = tiny.build()
    call = one_call(pipe, tiny, rows=1)
    expected, before = _net(pipe, call), _traces(pipe)
    fastdiff.accelerate(pipe, quant=quant)
    assert 1e-4 < _error(_net(pipe, call), expected) < 0.3
    found = fastdiff.report(pipe)
    assert 0 < found.quantized["transformer"] and "quantized to" in str(found)
    fastdiff.undo(pipe)
    assert torch.equal(_net(pipe, call), expected) and _traces(pipe) == before
