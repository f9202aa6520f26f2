"""UNets on fused kernels: the module's own numbers within each mode's bound, for every family and argument they know."""

import math

import pytest
import torch
from unet_networks import (
    BF16,
    EXACT,
    SDXL,
    W8A8,
    bundled_unet,
    call,
    calls_of,
    conditional_unet,
    decibels,
    inputs_of,
    plain_unet,
    relative_error,
)

import fastdiff
from fastdiff.models.load import load_model
from fastdiff.ops import backend, native
from fastdiff.solvers.compat import process_of

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

CASES = {
    "bundled": (bundled_unet, {}),
    "bundled, no attention": (bundled_unet, dict(add_attention=False, down_block_types=("DownBlock2D",) * 2)),
    "bundled, no padding": (bundled_unet, dict(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)),
    "plain": (plain_unet, {}),
    "plain, no padding": (plain_unet, dict(downsample_padding=0, attention_head_dim=8, layers_per_block=2)),
    "plain, no middle": (plain_unet, dict(mid_block_type=None)),
    "plain, classes": (plain_unet, dict(num_class_embeds=5)),
    "plain, class timesteps": (plain_unet, dict(class_embed_type="timestep")),
    "plain, scale and shift": (plain_unet, dict(resnet_time_scale_shift="scale_shift")),
    "conditional": (conditional_unet, {}),
    "linear projections": (conditional_unet, dict(use_linear_projection=True, attention_head_dim=(4, 8))),
    "only cross-attention": (conditional_unet, dict(only_cross_attention=(True, False))),
    "two block kinds": (
        conditional_unet,
        dict(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"), downsample_padding=0),
    ),
    "sdxl": (conditional_unet, SDXL),
    "guidance embedding": (conditional_unet, dict(time_cond_proj_dim=12)),
    "projected text": (conditional_unet, dict(encoder_hid_dim=20)),
    "class vectors": (
        conditional_unet,
        dict(class_embed_type="projection", projection_class_embeddings_input_dim=9, class_embeddings_concat=True),
    ),
    "identity class": (conditional_unet, dict(class_embed_type="identity", time_embedding_act_fn="gelu")),
    "fourier time": (conditional_unet, dict(time_embedding_type="fourier", mid_block_type="UNetMidBlock2D")),
}


@pytest.mark.parametrize("make, changes", CASES.values(), ids=CASES)
def test_every_mode_gives_the_modules_numbers(make, changes):
    net = make(**changes)
    calls = [
        inputs_of(net, seed, rows, size) for seed, rows, size in ((0, 3, (8, 12)), (1, 1, (16, 4)), (2, 3, (8, 12)))
    ]
    truths = [call(net, *args, **named) for args, named in calls]
    for mode in ("exact", "bf16", "w8a8"):
        fastdiff.accelerate(net, mode, strict=True)
        for (args, named), truth in zip(calls, truths, strict=True):
            got = call(net, *args, **named)
            assert got.shape == truth.shape and got.dtype == truth.dtype
            if mode == "w8a8":
                assert decibels(got, truth) > W8A8
            else:
                assert relative_error(got, truth) < (EXACT if mode == "exact" else BF16), mode


@pytest.mark.parametrize("make", (bundled_unet, plain_unet, conditional_unet))
@pytest.mark.parametrize("mode", ("exact", "bf16", "w8a8"))
def test_recorded_programs_equal_eager_calls(make, mode):
    net = make()
    args, named = inputs_of(net)
    fastdiff.accelerate(net, mode, strict=True)
    recorded = call(net, *args, **named)
    with backend("cpu"):
        assert torch.equal(call(net, *args, **named), recorded)


@pytest.mark.parametrize("mode", ("exact", "bf16", "w8a8"))
def test_rows_do_not_depend_on_the_batch(mode):
    net = conditional_unet()
    (x, t, text), _ = inputs_of(net)
    fastdiff.accelerate(net, mode, strict=True, exact_time=False)
    net.prepare_schedule(x, t[None], encoder_hidden_states=text)
    whole = call(net, x, t, text)
    for i in range(len(x)):
        assert torch.equal(call(net, x[i : i + 1], t[i : i + 1], text[i : i + 1]), whole[i : i + 1])


def test_timesteps_and_contexts_are_looked_up_by_value():
    net, same = conditional_unet(**SDXL), conditional_unet(**SDXL)
    fastdiff.accelerate(net, "exact", strict=True)
    (x, _, text), named = inputs_of(net)
    other = {"added_cond_kwargs": {name: -value for name, value in named["added_cond_kwargs"].items()}}
    changed = text.clone()
    for t in (7, torch.tensor(31), torch.tensor([5, 400, 999]), 7.25):
        for context in (text, changed):
            for added in (named, other):
                assert relative_error(call(net, x, t, context, **added), call(same, x, t, context, **added)) < EXACT
        changed.mul_(-1)  # in place: the same tensor with other values
    assert calls_of(net) == {"fused": 16}


def test_time_is_computed_once_per_schedule():
    net = plain_unet()
    fastdiff.accelerate(net, "bf16", strict=True)
    (x, _), _ = inputs_of(net)
    times = torch.arange(0, 1000, 50.0)[:, None].expand(-1, len(x))
    net.prepare_schedule(x, times)
    table = net._fastdiff.lowered.temporal
    computed = table.computed
    for t in times:
        call(net, x, t)
    assert table.computed == computed >= len(times)


def test_results_have_the_modules_types():
    net = plain_unet()
    (x, t), _ = inputs_of(net)
    with torch.no_grad():
        kinds = [type(net(x, t)), type(net(x, t, return_dict=False))]
        fastdiff.accelerate(net, "exact", strict=True)
        assert [type(net(x, t)), type(net(sample=x, timestep=t, return_dict=False))] == kinds
    half = conditional_unet().to(torch.bfloat16)
    args, _ = inputs_of(half)
    args = [a.bfloat16() if a.is_floating_point() else a for a in args]
    truth = call(half, *args)
    got = call(fastdiff.accelerate(half, "bf16", strict=True), *args)
    assert got.dtype == torch.bfloat16 and relative_error(got.float(), truth.float()) < 2 * BF16


def test_record_names_every_layer_and_what_is_spared():
    net = conditional_unet()
    fastdiff.accelerate(net, "w8a8", spare=["mid_block.attentions.0.proj_in"])
    runs = {layer.name: (layer.runs, layer.reason) for layer in fastdiff.report(net).layers}
    assert runs["down_blocks.0.resnets.0.conv1"] == ("w8a8", "")
    assert runs["mid_block.attentions.0.proj_in"] == ("bfloat16", "asked for")
    assert runs["mid_block.attentions.0.transformer_blocks.0.attn2.kv"][0] == "bfloat16"
    for name in ("conv_in", "conv_out"):
        assert runs[name][0] == "float32" and "layer" in runs[name][1]


def test_original_weights_can_be_given_up():
    net = conditional_unet()
    args, _ = inputs_of(net)
    truth = call(net, *args)
    fastdiff.accelerate(net, "w8a8", keep_original=False)
    assert decibels(call(net, *args), truth) > W8A8
    left = [p for name, p in net.named_parameters() if p.device.type == "cpu" and p.dim() > 1]
    assert left and all("time" in name for name, p in net.named_parameters() if any(p is one for one in left))


@pytest.mark.slow
@pytest.mark.parametrize("mode, least", (("bf16", 48.0), ("w8a8", 34.0)))
def test_samplings_of_the_bundled_model_stay_close(mode, least):
    model = load_model("bundled:unet")
    model.net.eval()
    images = []
    for name in (None, mode):
        if name is not None:
            fastdiff.accelerate(model.net, name, strict=True)
        sampler = fastdiff.Sampler(model.net, prediction=model.prediction, process=process_of(model.scheduler_config))
        images.append(sampler.sample((16, model.channels, model.size, model.size), steps=20, clamp=None))
    error = (images[0] - images[1]).square().mean()
    assert 10 * math.log10(4 / error) > least  # images span -1 to 1
