"""fastdiff as a quantization method of diffusers: quantized while loading, saved, and loaded quantized."""

import importlib.util
import json

import pytest
import torch

import fastdiff
from fastdiff.models.checkpoint import load_checkpoint
from fastdiff.models.load import load_model
from fastdiff.quant import quantize
from fastdiff.quant.recipes import recipe_of
from fastdiff.quantized import quantize_model

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs diffusers", allow_module_level=True)

import diffusers
from tiny_pipelines import TINY

CALL = {
    "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([5, 700]),
    "class_labels": torch.tensor([0, 1]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small DiT as diffusers saves it."""
    path = tmp_path_factory.mktemp("dit")
    TINY["DiT"].build().transformer.save_pretrained(path)
    return path


def _load(path, *recipe, **options):
    if recipe:
        options["quantization_config"] = fastdiff.FastdiffConfig(*recipe)
    return diffusers.DiTTransformer2DModel.from_pretrained(path, **options)


def _out(net) -> torch.Tensor:
    with torch.no_grad():
        return net(**CALL).sample


@pytest.mark.parametrize("recipe", ("w8a8", "w8a16", "w4a16", "w4a8", "fp8"))
def test_a_model_is_quantized_as_it_is_loaded_and_reopens_bit_for_bit(folder, tmp_path, recipe):
    by_hand = _load(folder)
    quantize(by_hand, recipe_of(recipe).config)
    net = _load(folder, recipe)
    assert torch.equal(_out(net), _out(by_hand))
    net.save_pretrained(tmp_path)
    again = _load(tmp_path)
    assert torch.equal(_out(again), _out(net))
    again.save_pretrained(tmp_path / "again")
    (first, records), (second, same) = (
        load_checkpoint(path / "diffusion_pytorch_model.safetensors") for path in (tmp_path, tmp_path / "again")
    )
    assert records == same and first.keys() == second.keys()
    assert all(torch.equal(tensor.view(torch.uint8), second[key].view(torch.uint8)) for key, tensor in first.items())


def test_another_dtype_casts_all_but_codes_and_scales(folder, tmp_path):
    _load(folder, "w4a8").save_pretrained(tmp_path)
    plain = _load(tmp_path).state_dict()
    for name, tensor in _load(tmp_path, torch_dtype=torch.bfloat16).state_dict().items():
        kept = name.rsplit(".", 1)[0] + ".weight_scale" in plain
        assert tensor.dtype == (plain[name].dtype if kept else torch.bfloat16), name


def test_spared_layers_stay(folder):
    net = _load(folder, "w8a8", ("to_q$",))
    assert type(net.transformer_blocks[0].attn1.to_q) is torch.nn.Linear
    assert type(net.transformer_blocks[0].attn1.to_k) is not torch.nn.Linear


def test_a_whole_pipeline(tmp_path):
    """With diffusers' own mapping of components, and on the fused kernels afterwards."""
    tiny = TINY["DiT"]
    tiny.build().save_pretrained(tmp_path / "plain")
    mapping = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": fastdiff.FastdiffConfig("w8a8")})
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "plain", quantization_config=mapping)
    pipe.set_progress_bar_config(disable=True)
    expected = tiny(pipe)
    pipe.save_pretrained(tmp_path / "quantized")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "quantized")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny(again), expected)
    if fastdiff.ops.native.cpu() is not None:
        fastdiff.accelerate(again)
        assert (tiny(again) - expected).abs().max() < 0.05 * expected.abs().max()
        assert fastdiff.report(again).parts["transformer"].lowered


def test_both_ways_of_saving_open_in_both_ways(tmp_path):
    model = load_model("bundled:dit")
    made = quantize_model(model, "w8a8")
    x, t, labels = torch.randn(1, 1, 32, 32), torch.tensor([500.0]), torch.tensor([3])
    with torch.no_grad():
        expected = model.net(x, t, class_labels=labels)
        fastdiff.save(model, made, tmp_path / "ours")
        fastdiff.FastdiffConfig()  # registers the method
        net = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours" / "transformer")
        theirs = net(x, timestep=t, class_labels=labels).sample
        assert (theirs - expected).abs().max() < 1e-4 * expected.abs().max()
        net.save_pretrained(tmp_path / "theirs")
        ours = fastdiff.load(tmp_path / "theirs").net(x, t, class_labels=labels)
        assert torch.equal(ours, expected)


def test_settings_that_disagree_with_the_weights_are_refused(folder, tmp_path):
    _load(folder, "w8a8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["transformer_blocks.0.attn1.to_q"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layers must name entries of schemes"):
        _load(tmp_path)


@pytest.mark.parametrize(
    "recipe, words", [("w9", "unknown recipe"), ("tfmq", "needs calibration data; without it work")]
)
def test_recipes_that_cannot_work_here_say_so(recipe, words):
    with pytest.raises(ValueError, match=words):
        fastdiff.FastdiffConfig(recipe)
