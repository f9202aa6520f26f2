"""What only transformers with two streams have: position ids, guidance and pooled text in the temporal table, cropped positions."""

import copy

import pytest
import torch
from context_networks import TOKENS, predict
from joint_networks import JOINT, POOLED

import fastdiff
from fastdiff.ops import native
from fastdiff.ops.coded import Coded, take

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")
EXACT = 1e-5  # largest error relative to the output's largest magnitude


def _error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _calls(net) -> dict:
    return fastdiff.report(net).calls


@pytest.mark.parametrize("name", ("sd3.5", "flux-guided"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_exact_rows_have_the_bits_of_the_modules_own_modulations(name, dtype):
    net, seen = JOINT[name].build().to(dtype), {}
    call = {k: v.to(dtype) if k != "img_ids" else v for k, v in JOINT[name].call(3).items()}
    hooks = [
        module.register_forward_hook(lambda module, args, out, key=key: seen.__setitem__(key, out))
        for key, module in net.named_modules()
        if "norm" in key and key.endswith("linear")
    ]
    predict(net, call)
    for hook in hooks:
        hook.remove()
    fastdiff.accelerate(net, "exact", strict=True)
    lowered = net._fastdiff.lowered
    rows = lowered.temporal.lookup(*lowered.read(**call).temporal)
    own = torch.cat([out.flatten(1) for out in seen.values()], dim=1).float()
    assert rows.dtype == torch.float32 and torch.equal(rows.sort(1)[0], own.sort(1)[0])


@pytest.mark.parametrize("name", ("sd3", "flux-guided"))
def test_batched_rows_are_within_a_millionth(name):
    net = fastdiff.accelerate(JOINT[name].build(), "bf16", strict=True)
    lowered = net._fastdiff.lowered
    inputs = [lowered.read(**JOINT[name].call(3, seed=seed)).temporal for seed in range(4)]
    together = [torch.cat(parts) for parts in zip(*inputs, strict=True)]
    lowered.temporal.prepare(*together)
    exact = copy.deepcopy(net).double()._fastdiff.lowered.temporal
    for one in inputs:
        wide = exact._compute(*(value.double() for value in one))
        assert _error(lowered.temporal.lookup(*one), wide.float()) < 1e-6
    assert lowered.temporal.computed == 12


@pytest.mark.parametrize("name", ("sd3", "flux-guided"))
def test_every_vector_of_conditioning_counts(name):
    network = JOINT[name]
    net, plain, call = fastdiff.accelerate(network.build(), strict=True), network.build(), network.call()
    first = predict(net, call)
    changes = {"timestep": 0.7, "pooled_projections": -1.0, "encoder_hidden_states": 2.0, "guidance": 0.5}
    for key, factor in changes.items():
        if key in call:
            changed = call | {key: call[key] * factor}
            assert (
                _error(predict(net, changed), predict(plain, changed)) < EXACT < _error(predict(net, changed), first)
            )
    assert torch.equal(predict(net, call), first)


def test_position_ids_are_looked_up_by_value():
    network = JOINT["flux"]
    net, plain, call = fastdiff.accelerate(network.build(), strict=True), network.build(), network.call()
    for ids in (call["img_ids"], call["img_ids"].flip(0), call["img_ids"][None], call["img_ids"] + 3):
        changed = call | {"img_ids": ids, "txt_ids": torch.ones(TOKENS, 3)}
        assert _error(predict(net, changed), predict(plain, changed)) < EXACT
    call["img_ids"].mul_(2)  # in place: the same tensor with other values
    assert _error(predict(net, call), predict(plain, call)) < EXACT


def test_results_have_the_modules_types():
    for name in ("sd3", "flux"):
        net, call = JOINT[name].build(), JOINT[name].call()
        with torch.no_grad():
            kinds = [type(net(**call)), type(net(**call, return_dict=False))]
            fastdiff.accelerate(net, strict=True)
            assert [type(net(**call)), type(net(**call, return_dict=False))] == kinds


def test_original_weights_can_be_given_up():
    for name in ("sd3.5", "flux"):
        net, call = JOINT[name].build(), JOINT[name].call()
        own = predict(net, call)
        fastdiff.accelerate(net, "w8a8", keep_original=False, strict=True)
        assert _error(predict(net, call), own) < 0.1
        kept = {key for key, p in net.named_parameters() if p.dim() > 1 and p.device.type == "cpu"}
        assert kept and all(".linear" in key or "time_text_embed" in key for key in kept)


@pytest.mark.parametrize("mode", ("bf16", "w8a8"))
def test_spared_layers_stay_in_floating_point(mode):
    net, call = JOINT["flux"].build(), JOINT["flux"].call()
    own = predict(net, call)
    spared = ["single_transformer_blocks.0.proj_mlp", "transformer_blocks.1.attn.to_add_out"]
    fastdiff.accelerate(net, mode, spare=spared, strict=True)
    assert _error(predict(net, call), own) < 0.06
    runs = {layer.name: layer.runs for layer in fastdiff.report(net).layers}
    assert all(runs[name] == "bfloat16" for name in spared) and runs["x_embedder"] == runs["proj_out"] == "float32"


@pytest.mark.parametrize("recipe", ("w8a8", "w4a16"))
@pytest.mark.parametrize("name", ("sd3.5", "flux"))
def test_quantized_layers_run_in_the_fused_forward(name, recipe):
    net, call = JOINT[name].build(), JOINT[name].call()
    fastdiff.quantize(net, recipe)
    own = predict(net, call)
    fastdiff.accelerate(net, "exact", strict=True)
    assert _error(predict(net, call), own) < 0.02
    runs = {layer.name: layer.runs for layer in fastdiff.report(net).layers}
    assert any("quantized" in runs[key] for key in runs if "attn.qkv" in key)
    if name == "flux":
        assert all("quantized" in runs[f"single_transformer_blocks.0.proj_out ({part})"] for part in ("heads", "mlp"))


def test_quantized_layers_are_cut_between_their_groups():
    coded = Coded(torch.arange(-32, 32, dtype=torch.int8).view(2, 32), torch.rand(2, 4), None, torch.ones(2), "float")
    parts = take(coded, slice(0, 8)), take(coded, slice(8, None))
    weight = lambda c: c.codes.unflatten(1, (c.scale.shape[1], -1)) * c.scale[..., None]
    assert torch.equal(torch.cat([weight(part) for part in parts], 1), weight(coded))
    assert parts[0].bias is None and parts[1].bias is coded.bias
    with pytest.raises(ValueError, match="8 inputs share a scale"):
        take(coded, slice(0, 12))


FALLBACKS = (
    ("sd3", {"skip_layers": [1]}, "skip_layers"),
    ("sd3", {"block_controlnet_hidden_states": [torch.randn(2, 16, 48)]}, "block_controlnet_hidden_states"),
    ("sd3", {"joint_attention_kwargs": {"scale": 1.0}}, "joint_attention_kwargs"),
    ("sd3", {"pooled_projections": torch.randn(1, POOLED)}, "pooled text"),
    ("sd3", {"timestep": torch.tensor([3.0])}, None),
    ("sd3", {"joint_attention_kwargs": {}}, None),
    ("flux", {"controlnet_block_samples": [torch.randn(2, 20, 48)]}, "controlnet_block_samples"),
    ("flux", {"controlnet_single_block_samples": [torch.randn(1, 20, 48)]}, "controlnet_single_block_samples"),
    ("flux", {"joint_attention_kwargs": None}, None),
)


@pytest.mark.parametrize("name, change, reason", FALLBACKS)
def test_arguments_that_are_not_lowered_run_the_modules_own_forward(name, change, reason):
    net, call = JOINT[name].build(), JOINT[name].call() | change
    own = predict(net, call)
    fastdiff.accelerate(net, "exact")
    assert (torch.equal if reason else lambda a, b: _error(a, b) < EXACT)(predict(net, call), own)
    assert any(reason in why for why in _calls(net)) if reason else _calls(net) == {"fused": 1}


def test_later_changes_of_the_structure_are_respected():
    net, call = fastdiff.accelerate(JOINT["flux"].build(), "w8a8"), JOINT["flux"].call()
    predict(net, call)
    net.fuse_qkv_projections()
    own = predict(JOINT["flux"].build(), call)
    assert _error(predict(net, call), own) < EXACT and len(_calls(net)) == 2


def test_other_architectures_are_named():
    other = JOINT["flux"].build()
    other.single_transformer_blocks[1].act_mlp = torch.nn.GELU()
    adapted = JOINT["sd3"].build()
    adapted.transformer_blocks[1].attn.processor = _Adapter()
    ended = JOINT["sd3"].build()
    ended.transformer_blocks = ended.transformer_blocks[:-1]
    for net, reason in ((other, "act_mlp is not GELU"), (adapted, "the processor _Adapter"), (ended, "text ends")):
        with pytest.raises(RuntimeError, match=reason):
            fastdiff.accelerate(net, strict=True)


class _Adapter:
    """An attention processor of somebody else's."""
