"""LoRA through peft on quantized layers: exactly the product that it adds to an unquantized layer, and away again."""

import importlib.util

import pytest
import torch
from quant_networks import inputs, output, tiny_dit
from torch import nn

from fastdiff import accelerate, report
from fastdiff.quant import quantize
from fastdiff.quant.recipes import recipe_of

if importlib.util.find_spec("peft") is None:
    pytest.skip("needs peft", allow_module_level=True)

import peft

RECIPES = ("w8a8", "w8a16", "w4a16", "w4a8")


def _quantized(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64)).eval()
    quantize(net, recipe_of(recipe).config)
    return net


def _adapt(net: nn.Module, name: str, seed: int, rank: int = 4) -> tuple[nn.Module, list[torch.Tensor]]:
    """The network with an adapter of random weights, and what the adapter adds to each weight, float64."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])
    peft.inject_adapter_in_model(config, net, adapter_name=name)
    torch.manual_seed(seed)
    added = []
    for layer in (net[0], net[2]):
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        for weight in (down, up):
            nn.init.normal_(weight, std=0.1)
        added.append(2 * up.detach().double() @ down.detach().double())
    return net, added


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_product_is_added_and_codes_stay(recipe):
    net = _quantized(recipe)
    x = torch.randn(5, 64)
    with torch.no_grad():
        before = net[0](x)
        codes = {name: buffer.clone() for name, buffer in net.named_buffers()}
        net, added = _adapt(net, "style", 1)
        expected = before.double() + x.double() @ added[0].T
        assert (net[0](x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, layer in (("0", net[0]), ("2", net[2])):
        for part, buffer in layer.base_layer.named_buffers():
            assert torch.equal(buffer, codes[f"{name}.{part}"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_are_swapped_and_removed_without_a_trace(recipe):
    net, x = _quantized(recipe), torch.randn(5, 64)
    with torch.no_grad():
        before = net(x)
        net, first = _adapt(net, "first", 1)
        net, second = _adapt(net, "second", 2, rank=3)
        for name, added in (("first", first), ("second", second)):
            for layer in (net[0], net[2]):
                layer.set_adapter(name)
            expected = net[0].base_layer(x).double() + x.double() @ added[0].T
            assert (net[0](x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        plain = nn.Sequential(net[0].base_layer, net[1], net[2].base_layer)
        assert torch.equal(plain(x), before)


def test_bfloat16_activations_lose_no_more_than_their_rounding():
    net, x = _quantized("w8a8"), torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        before = net[0](x)
        net, added = _adapt(net, "style", 1)
        expected = before.double() + x.double() @ added[0].T
        assert (net[0](x) - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_a_quantized_network_is_not_quantized_again():
    with pytest.raises(ValueError, match="quantized already"):
        quantize(_quantized("w8a8"), recipe_of("w4a16").config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_of_quantized_layers_run_in_the_fused_forward(recipe):
    net, data = tiny_dit(), inputs("dit")
    quantize(net, recipe_of(recipe).config)
    plain = output(net, data)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    peft.inject_adapter_in_model(config, net, adapter_name="style")
    torch.manual_seed(1)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    want = output(net, data)
    accelerate(net, "exact", strict=True)
    got = output(net, data)
    assert report(net).calls == {"fused": 1}
    assert (got - want).norm() < 1e-3 * (want - plain).norm()
