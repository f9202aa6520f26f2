"""Accelerated pipelines together with what users combine them with: each pair gives what it gives without us."""

import importlib.util

import pytest
import torch

import fastdiff
from fastdiff.ops import native

if native.cpu() is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs the compiled kernels and diffusers", allow_module_level=True)

from tiny_pipelines import TINY, denoiser, one_call

EXACT = 1e-5
slow = pytest.mark.slow


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


def _part(pipe) -> fastdiff.Report:
    return fastdiff.report(pipe).parts["unet" if "unet" in pipe.components else "transformer"]


def _lora(name: str, folder, seed: int) -> str:
    """Saves an adapter of rank 3 for the attention of a family; returns where."""
    peft = pytest.importorskip("peft")
    pipe = TINY[name].build()
    net = denoiser(pipe)
    net.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    for key, p in net.named_parameters():
        if "lora" in key:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    layers = peft.get_peft_model_state_dict(net)
    kind = "unet_lora_layers" if "unet" in pipe.components else "transformer_lora_layers"
    type(pipe).save_lora_weights(folder / str(seed), **{kind: layers})
    return str(folder / str(seed))


@slow
@pytest.mark.parametrize("name", ["SD1.5", "SD3", "FLUX"])
def test_lora_is_loaded_scaled_swapped_fused_and_unloaded(name, tmp_path):
    tiny = TINY[name]
    first, second = _lora(name, tmp_path, 1), _lora(name, tmp_path, 2)
    stages = {
        "load": lambda pipe: pipe.load_lora_weights(first, adapter_name="style"),
        "scale": lambda pipe: pipe.set_adapters("style", 0.5),
        "swap": lambda pipe: pipe.load_lora_weights(second, adapter_name="style", hotswap=True),
        "fuse": lambda pipe: pipe.fuse_lora(),
        "unfuse": lambda pipe: pipe.unfuse_lora(),
        "disable": lambda pipe: pipe.disable_lora(),
        "unload": lambda pipe: pipe.unload_lora_weights(),
    }
    stock, fast = tiny.build(), fastdiff.accelerate(tiny.build())
    call = one_call(stock, tiny, rows=1)
    plain, seen = _net(stock, call), []
    assert _error(_net(fast, call), plain) < EXACT
    for stage, change in stages.items():
        change(stock)
        change(fast)
        expected = _net(stock, call)
        assert _error(_net(fast, call), expected) < EXACT, stage
        seen.append(_error(expected, plain) > 1e-3)
    assert seen == [True] * 5 + [False] * 2
    assert _part(fast).calls == {"fused": 1 + len(stages)}, "an adapter is packed with the weights"
    fastdiff.undo(fast)
    assert torch.equal(_net(fast, call), _net(stock, call))


@slow
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_lora_on_quantized_layers_is_fused_beside_the_codes(recipe, safe, tmp_path):
    """Loaded, scaled, fused, unfused, swapped and unloaded: always the quantized layers' result and the exact product."""
    tiny = TINY["SD1.5"]
    first, second = _lora("SD1.5", tmp_path, 1), _lora("SD1.5", tmp_path, 2)
    pipe = tiny.build()
    call = one_call(pipe, tiny, rows=1)
    untouched = _net(pipe, call)
    fastdiff.accelerate(pipe, quant=recipe)
    codes = {
        key: value.clone() for key, value in pipe.unet.state_dict().items() if value.dtype in (torch.int8, torch.uint8)
    }
    plain = _net(pipe, call)
    pipe.load_lora_weights(first, adapter_name="style")
    loaded = _net(pipe, call)
    pipe.fuse_lora(safe_fusing=safe)
    fused = _net(pipe, call)
    pipe.unfuse_lora()
    assert _error(loaded, plain) > 1e-3 and _error(fused, loaded) < 2e-2 and torch.equal(_net(pipe, call), loaded)
    pipe.fuse_lora(lora_scale=0.5)
    half = _net(pipe, call)
    pipe.unfuse_lora()
    assert 1e-3 < _error(half, loaded) and _error(half, plain) > 1e-3
    pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
    assert _error(_net(pipe, call), loaded) > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(_net(pipe, call), plain) and codes
    assert all(torch.equal(pipe.unet.state_dict()[key], value) for key, value in codes.items())
    fastdiff.undo(pipe)
    assert torch.equal(_net(pipe, call), untouched)


@slow
@pytest.mark.parametrize("name", ["SD1.5", "DiT", "FLUX"])
def test_compiled_denoisers_are_traced_whole(name):
    """torch.compile sees the module's own operations, not ours."""
    tiny = TINY[name]
    pipe = tiny.build()
    call = one_call(pipe, tiny, rows=1)
    expected = _net(pipe, call)
    fastdiff.accelerate(pipe)
    compiled = torch.compile(denoiser(pipe), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert _error(compiled(**call)[0], expected) < EXACT
    assert _error(_net(pipe, call), expected) < EXACT and _part(pipe).calls == {"fused": 1}


@slow
def test_layers_of_a_walked_module_are_compiled_whole():
    encoder = TINY["SD1.5"].build().text_encoder
    ids = torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        expected = encoder(ids)[0]
        fastdiff.accelerate(encoder)
        compiled = torch.compile(encoder.text_model if hasattr(encoder, "text_model") else encoder, backend="eager")
        assert _error(compiled(ids)[0], expected) < EXACT
        block = next(m for m in encoder.modules() if type(m).__name__ == "CLIPMLP")
        x = torch.randn(2, 16, 16)
        assert _error(torch.compile(block, fullgraph=True, backend="eager")(x), block(x)) < EXACT


def test_training_a_walked_module_reaches_every_weight():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
    x = torch.randn(3, 4)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    fastdiff.accelerate(net)(x).square().sum().backward()
    assert all(map(torch.equal, (p.grad for p in net.parameters()), expected))


def test_layers_without_a_kernel_are_told():
    net = fastdiff.accelerate(
        torch.nn.Sequential(torch.nn.Conv3d(2, 2, 1), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    )
    told = "; ".join(fastdiff.report(net).fallbacks)
    assert "0 runs on torch: no kernel for Conv3d" in told and "1 runs on torch: a norm by itself" in told


def _block_offload(net, folder):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(net, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def _leaf_offload(net, folder):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(net, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(folder))


def _accelerate_hook(net, folder):
    hooks = pytest.importorskip("accelerate").hooks
    hooks.add_hook_to_module(net, hooks.ModelHook())


def _layerwise_casting(net, folder):
    net.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("first", ["accelerate", "hook"])
@pytest.mark.parametrize("name", ["DiT", pytest.param("SD1.5", marks=slow), pytest.param("Wan", marks=slow)])
@pytest.mark.parametrize("hook", [_block_offload, _leaf_offload, _accelerate_hook, _layerwise_casting])
def test_hooks_of_others_go_on_working(name, hook, first, tmp_path):
    tiny = TINY[name]
    stock, fast = tiny.build(), tiny.build()
    call = one_call(stock, tiny, rows=1)
    for pipe, folder in ((stock, "stock"), (fast, "fast")):
        (tmp_path / folder).mkdir()
        if pipe is fast and first == "accelerate":
            fastdiff.accelerate(fast)
            _net(fast, call)
        hook(denoiser(pipe), tmp_path / folder)
        if pipe is fast and first == "hook":
            fastdiff.accelerate(fast)
    expected = _net(stock, call)
    assert _error(_net(fast, call), expected) < EXACT
    assert _error(_net(fast, call), expected) < EXACT
    if hook is _accelerate_hook:
        assert _part(fast).calls.keys() == {"fused"}, "a hook around the whole module keeps no one from fused kernels"
    fastdiff.undo(fast)
    assert torch.equal(_net(fast, call), expected)


@slow
@pytest.mark.parametrize("keeps_weights", [False, True])
def test_offloading_by_accelerate(keeps_weights):
    """Weights that are away between calls cannot be packed; those that only move can."""
    offload = pytest.importorskip("accelerate")
    tiny, cpu = TINY["DiT"], torch.device("cpu")
    pipe = tiny.build()
    call = one_call(pipe, tiny, rows=1)
    expected = _net(pipe, call)
    fastdiff.accelerate(pipe)
    (offload.cpu_offload_with_hook if keeps_weights else offload.cpu_offload)(pipe.transformer, execution_device=cpu)
    assert _error(_net(pipe, call), expected) < EXACT and _error(_net(pipe, call), expected) < EXACT
    assert ("fused" in _part(pipe).calls) == keeps_weights
    fastdiff.undo(pipe)
    assert torch.equal(_net(pipe, call), expected)
    if not keeps_weights:
        with pytest.raises(ValueError, match="got meta; accelerate it before its weights are offloaded"):
            fastdiff.accelerate(pipe)


@slow
@pytest.mark.parametrize("switch", ["tiling", "slicing"])
@pytest.mark.parametrize("name", ["SD1.5", "FLUX", "Wan"])
def test_vae_tiling_and_slicing(name, switch):
    tiny = TINY[name]
    pipe = tiny.build()
    getattr(pipe.vae, f"enable_{switch}")()
    for attribute in ("tile_sample_min_size", "tile_latent_min_size"):
        if hasattr(pipe.vae, attribute):
            setattr(pipe.vae, attribute, getattr(pipe.vae, attribute) // 2)
    expected = tiny(pipe, output_type="np", rows=2)
    fastdiff.accelerate(pipe)
    assert (tiny(pipe, output_type="np", rows=2) - expected).abs().max() < 1e-4
    assert sum(fastdiff.report(pipe).parts["vae.decoder"].calls.values()) > 1


@slow
def test_caches_of_diffusers_go_on_working():
    from diffusers import FirstBlockCacheConfig

    tiny = TINY["FLUX"]
    pipe = tiny.build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    expected = tiny(pipe, steps=6)
    fastdiff.accelerate(pipe)
    assert _error(tiny(pipe, steps=6), expected) < EXACT
    assert not _part(pipe).calls.get("fused")


def test_the_guard_names_layer_and_step_and_saves_the_run():
    tiny = TINY["DiT"]
    pipe, truth = tiny.build(), tiny.build()
    for one in (pipe, truth):
        ff = one.transformer.transformer_blocks[1].ff.net
        with torch.no_grad():
            ff[0].proj.weight.mul_(1e5)
            ff[2].weight.mul_(1e-4)
    call = one_call(truth, tiny, rows=1)
    ff[0].register_forward_hook(lambda layer, args, out: out.clamp(max=65504.0))  # what float16 holds
    expected = _net(truth, call)
    pipe.transformer.half()
    call = call | {"hidden_states": call["hidden_states"].half()}
    assert not _net(pipe, call).isfinite().all()
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *a: None)  # keeps it off the fused forward
    fastdiff.accelerate(pipe.transformer, guard=True)
    assert _error(_net(pipe, call).float(), expected) < 2e-2
    (event,) = fastdiff.report(pipe.transformer).guard
    assert event.startswith("call 1, timestep 950: transformer_blocks.1.ff.net.0")
    assert event.endswith("overflowed in float16, done again in float32")


def test_the_guard_gives_up_where_float32_does_not_help():
    tiny = TINY["DiT"]
    pipe = tiny.build()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].attn1.to_out[0].bias[3] = float("nan")
    fastdiff.accelerate(pipe, guard=True)
    with pytest.raises(
        fastdiff.NonFiniteError, match=r"transformer_blocks\.1\.attn1\.to_out\.0 .* call 1, timestep \d+"
    ):
        tiny(pipe)


def test_the_guard_leaves_good_runs_alone():
    tiny = TINY["DiT"]
    pipe = fastdiff.accelerate(tiny.build())
    expected = tiny(pipe)
    fastdiff.accelerate(pipe, guard=True)
    assert torch.equal(tiny(pipe), expected) and _part(pipe).guard == () and _part(pipe).calls == {"fused": 3}
