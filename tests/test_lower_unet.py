"""UNets on fused kernels: the module's own numbers within each mode's bound, for every family and argument they know."""

import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.models.load import load_model
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.ops import backend, native
from fastdiff.solvers.compat import process_of

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

# largest error relative to the output's largest magnitude; w8a8: signal to noise in dB
EXACT, BF16, W8A8 = 1e-5, 3e-2, 25.0

SMALL = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
PLAIN = dict(
    **SMALL,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
)
CONDITIONAL = dict(
    **SMALL,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
    attention_head_dim=4,
)
SDXL = dict(
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=58,
    transformer_layers_per_block=(1, 2),
)


def _bundled(**changes) -> nn.Module:
    torch.manual_seed(0)
    shape = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=16)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return UNet(UNetConfig(**{**shape, **blocks, **changes})).eval()


def _plain(**changes) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**PLAIN, **changes}).eval()


def _conditional(**changes) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**{**CONDITIONAL, **changes}).eval()


def _inputs(net: nn.Module, seed: int = 0, rows: int = 3, size: tuple[int, int] = (8, 12), tokens: int = 7) -> tuple:
    """Positional and named arguments of a call, whatever the network's configuration wants."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    config, named = net.config, {}
    args = [normal(rows, config.in_channels, *size), torch.randint(0, 1000, (rows,), generator=generator)]
    if hasattr(config, "cross_attention_dim"):
        args.append(normal(rows, tokens, config.encoder_hid_dim or config.cross_attention_dim))
    kind = getattr(config, "class_embed_type", None)
    if getattr(config, "num_class_embeds", None) or kind == "timestep":
        named["class_labels"] = torch.randint(0, 5, (rows,), generator=generator)
    elif kind is not None:
        named["class_labels"] = normal(rows, 128 if kind == "identity" else 9)
    if getattr(config, "time_cond_proj_dim", None):
        named["timestep_cond"] = normal(rows, config.time_cond_proj_dim)
    if getattr(config, "addition_embed_type", None):
        named["added_cond_kwargs"] = dict(text_embeds=normal(rows, 10), time_ids=1000 * normal(rows, 6))
    return args, named


def _call(net: nn.Module, *args, **named) -> torch.Tensor:
    with torch.no_grad():
        out = net(*args, **named)
    return out if isinstance(out, torch.Tensor) else out[0]


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _decibels(got: torch.Tensor, expected: torch.Tensor) -> float:
    return 10 * math.log10(expected.square().mean() / (got - expected).square().mean())


def _calls(net: nn.Module) -> dict[str, int]:
    return fastdiff.report(net).calls


CASES = {
    "bundled": (_bundled, {}),
    "bundled, no attention": (_bundled, dict(add_attention=False, down_block_types=("DownBlock2D",) * 2)),
    "bundled, no padding": (_bundled, dict(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1)),
    "plain": (_plain, {}),
    "plain, no padding": (_plain, dict(downsample_padding=0, attention_head_dim=8, layers_per_block=2)),
    "plain, no middle": (_plain, dict(mid_block_type=None)),
    "plain, classes": (_plain, dict(num_class_embeds=5)),
    "plain, class timesteps": (_plain, dict(class_embed_type="timestep")),
    "plain, scale and shift": (_plain, dict(resnet_time_scale_shift="scale_shift")),
    "conditional": (_conditional, {}),
    "linear projections": (_conditional, dict(use_linear_projection=True, attention_head_dim=(4, 8))),
    "only cross-attention": (_conditional, dict(only_cross_attention=(True, False))),
    "two block kinds": (
        _conditional,
        dict(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"), downsample_padding=0),
    ),
    "sdxl": (_conditional, SDXL),
    "guidance embedding": (_conditional, dict(time_cond_proj_dim=12)),
    "projected text": (_conditional, dict(encoder_hid_dim=20)),
    "class vectors": (
        _conditional,
        dict(class_embed_type="projection", projection_class_embeddings_input_dim=9, class_embeddings_concat=True),
    ),
    "identity class": (_conditional, dict(class_embed_type="identity", time_embedding_act_fn="gelu")),
    "fourier time": (_conditional, dict(time_embedding_type="fourier", mid_block_type="UNetMidBlock2D")),
}


@pytest.mark.parametrize("make, changes", CASES.values(), ids=CASES)
def test_every_mode_gives_the_modules_numbers(make, changes):
    net = make(**changes)
    calls = [
        _inputs(net, seed, rows, size) for seed, rows, size in ((0, 3, (8, 12)), (1, 1, (16, 4)), (2, 3, (8, 12)))
    ]
    truths = [_call(net, *args, **named) for args, named in calls]
    for mode in ("exact", "bf16", "w8a8"):
        fastdiff.accelerate(net, mode, strict=True)
        for (args, named), truth in zip(calls, truths, strict=True):
            got = _call(net, *args, **named)
            assert got.shape == truth.shape and got.dtype == truth.dtype
            if mode == "w8a8":
                assert _decibels(got, truth) > W8A8
            else:
                assert _error(got, truth) < (EXACT if mode == "exact" else BF16), mode


@pytest.mark.parametrize("make", (_bundled, _plain, _conditional))
@pytest.mark.parametrize("mode", ("exact", "bf16", "w8a8"))
def test_recorded_programs_equal_eager_calls(make, mode):
    net = make()
    args, named = _inputs(net)
    fastdiff.accelerate(net, mode, strict=True)
    recorded = _call(net, *args, **named)
    with backend("cpu"):
        assert torch.equal(_call(net, *args, **named), recorded)


@pytest.mark.parametrize("mode", ("exact", "bf16", "w8a8"))
def test_rows_do_not_depend_on_the_batch(mode):
    net = _conditional()
    (x, t, text), _ = _inputs(net)
    fastdiff.accelerate(net, mode, strict=True, exact_time=False)
    net.prepare_schedule(x, t[None], encoder_hidden_states=text)
    whole = _call(net, x, t, text)
    for i in range(len(x)):
        assert torch.equal(_call(net, x[i : i + 1], t[i : i + 1], text[i : i + 1]), whole[i : i + 1])


def test_timesteps_and_contexts_are_looked_up_by_value():
    net, same = _conditional(**SDXL), _conditional(**SDXL)
    fastdiff.accelerate(net, "exact", strict=True)
    (x, _, text), named = _inputs(net)
    other = {"added_cond_kwargs": {name: -value for name, value in named["added_cond_kwargs"].items()}}
    changed = text.clone()
    for t in (7, torch.tensor(31), torch.tensor([5, 400, 999]), 7.25):
        for context in (text, changed):
            for added in (named, other):
                assert _error(_call(net, x, t, context, **added), _call(same, x, t, context, **added)) < EXACT
        changed.mul_(-1)  # in place: the same tensor with other values
    assert _calls(net) == {"fused": 16}


def test_time_is_computed_once_per_schedule():
    net = _plain()
    fastdiff.accelerate(net, "bf16", strict=True)
    (x, _), _ = _inputs(net)
    times = torch.arange(0, 1000, 50.0)[:, None].expand(-1, len(x))
    net.prepare_schedule(x, times)
    table = net._fastdiff.lowered.temporal
    computed = table.computed
    for t in times:
        _call(net, x, t)
    assert table.computed == computed >= len(times)


def test_results_have_the_modules_types():
    net = _plain()
    (x, t), _ = _inputs(net)
    with torch.no_grad():
        kinds = [type(net(x, t)), type(net(x, t, return_dict=False))]
        fastdiff.accelerate(net, "exact", strict=True)
        assert [type(net(x, t)), type(net(sample=x, timestep=t, return_dict=False))] == kinds
    half = _conditional().to(torch.bfloat16)
    args, _ = _inputs(half)
    args = [a.bfloat16() if a.is_floating_point() else a for a in args]
    truth = _call(half, *args)
    got = _call(fastdiff.accelerate(half, "bf16", strict=True), *args)
    assert got.dtype == torch.bfloat16 and _error(got.float(), truth.float()) < 2 * BF16


class _OtherProcessor:
    """A processor from elsewhere that doubles what the usual one gives."""

    def __init__(self, usual) -> None:
        self.usual = usual

    def __call__(self, attn, hidden_states, **arguments):
        return 2 * self.usual(attn, hidden_states, **arguments)


def _with_processor(net):
    attention = net.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(_OtherProcessor(attention.processor))


def _with_hook(net):
    net.up_blocks[0].resnets[0].register_forward_hook(lambda module, args, out: 2 * out)


def _with_adapter(net):
    class Lora(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attn = net.mid_block.attentions[0].transformer_blocks[0].attn1
    old = attn.to_q
    attn.to_q = Lora(old.in_features, old.out_features, bias=False)
    attn.to_q.weight = old.weight


def _with_own_forward(net):
    block = net.down_blocks[0]
    own = block.forward
    block.forward = lambda *args, **named: own(*args, **named)


CHANGES = {
    "FreeU": lambda net: net.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "processor": _with_processor,
    "hook": _with_hook,
    "adapter": _with_adapter,
    "own forward": _with_own_forward,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_later_falls_back(change):
    net, plain = _conditional(), _conditional()
    args, _ = _inputs(net)
    fastdiff.accelerate(net, "exact")
    _call(net, *args)
    change(net)
    change(plain)
    truth = _call(plain, *args)
    assert torch.equal(_call(net, *args), truth)
    calls = _calls(net)
    assert calls.pop("fused") == 1 and list(calls.values()) == [1]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_before_is_not_lowered(change):
    net, plain = _conditional(), _conditional()
    args, _ = _inputs(net)
    change(net)
    change(plain)
    fastdiff.accelerate(net, "exact")
    assert _error(_call(net, *args), _call(plain, *args)) < EXACT
    found = fastdiff.report(net)
    assert "fused" not in found.calls and (not found.lowered or "FreeU is on" in found.calls)


def _mask(net):
    return dict(encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 3))


def _controlnet(net):
    skips = [(32, 8, 12)] * 2 + [(32, 4, 6), (64, 4, 6)]
    down = tuple(torch.randn(3, *shape) for shape in skips)
    return dict(down_block_additional_residuals=down, mid_block_additional_residual=torch.randn(3, 64, 4, 6))


ARGUMENTS = {
    "encoder_attention_mask": _mask,
    "attention_mask": lambda net: dict(attention_mask=torch.ones(3, 96)),
    "residuals": _controlnet,
    "cross_attention_kwargs": lambda net: dict(cross_attention_kwargs={"scale": 1.0}),
}


@pytest.mark.parametrize("extra", ARGUMENTS.values(), ids=ARGUMENTS)
def test_unknown_arguments_take_the_modules_own_way(extra):
    net, plain = _conditional(), _conditional()
    args, _ = _inputs(net)
    named = extra(net)
    fastdiff.accelerate(net, "w8a8")
    try:
        truth = _call(plain, *args, **named)
    except Exception as error:  # the module itself refuses some of these for a network this small
        with pytest.raises(type(error)):
            _call(net, *args, **named)
    else:
        assert torch.equal(_call(net, *args, **named), truth)
    (reason,) = _calls(net)
    assert "not lowered" in reason


@pytest.mark.parametrize("size", ((7, 10), (9, 9), (3, 5), (1, 6)))
def test_sizes_that_do_not_halve(size):
    shape = dict(
        block_out_channels=(32, 32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    )
    net = _conditional(**shape, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    args, _ = _inputs(net, size=size)
    truth = _call(net, *args)
    assert _error(_call(fastdiff.accelerate(net, "exact", strict=True), *args), truth) < EXACT


def test_sizes_that_padding_cannot_serve_take_the_modules_own_way():
    net, plain = _conditional(downsample_padding=0), _conditional(downsample_padding=0)
    args, _ = _inputs(net, size=(7, 10))
    fastdiff.accelerate(net, "w8a8")
    assert torch.equal(_call(net, *args), _call(plain, *args))
    assert _calls(net) == {"sizes are not multiples of 2": 1}


def test_active_dropout_takes_the_modules_own_way():
    net = _plain(dropout=0.5)
    args, _ = _inputs(net)
    fastdiff.accelerate(net, "exact")
    _call(net, *args)
    net.train()
    first, second = _call(net, *args), _call(net, *args)
    assert not torch.equal(first, second)
    assert _calls(net) == {"fused": 1, "dropout is active": 2}


UNSUPPORTED = {
    "center_input_sample": (_plain, dict(center_input_sample=True)),
    "divided by the timestep": (_plain, dict(time_embedding_type="fourier")),
    "downsamplers.0 is a ResnetBlock2D": (
        _plain,
        dict(down_block_types=("AttnDownBlock2D", "DownBlock2D"), downsample_type="resnet"),
    ),
    "SkipDownBlock2D": (_plain, dict(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"))),
    "scales its result": (_plain, dict(mid_block_scale_factor=2.0)),
    "activation": (_plain, dict(act_fn="gelu")),
    "addition_embed_type": (_conditional, dict(addition_embed_type="text", addition_embed_type_num_heads=2)),
    "SimpleCrossAttnDownBlock2D": (
        _conditional,
        dict(
            down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        ),
    ),
    "DualTransformer2DModel": (_conditional, dict(dual_cross_attention=True)),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_other_architectures_are_not_lowered(reason):
    make, changes = UNSUPPORTED[reason]
    net = fastdiff.accelerate(make(**changes), "exact")
    found = fastdiff.report(net)
    assert not found.lowered and reason in found.layers[0].reason


def test_record_names_every_layer_and_what_is_spared():
    net = _conditional()
    fastdiff.accelerate(net, "w8a8", spare=["mid_block.attentions.0.proj_in"])
    runs = {layer.name: (layer.runs, layer.reason) for layer in fastdiff.report(net).layers}
    assert runs["down_blocks.0.resnets.0.conv1"] == ("w8a8", "")
    assert runs["mid_block.attentions.0.proj_in"] == ("bfloat16", "asked for")
    assert runs["mid_block.attentions.0.transformer_blocks.0.attn2.kv"][0] == "bfloat16"
    for name in ("conv_in", "conv_out"):
        assert runs[name][0] == "float32" and "layer" in runs[name][1]


def test_original_weights_can_be_given_up():
    net = _conditional()
    args, _ = _inputs(net)
    truth = _call(net, *args)
    fastdiff.accelerate(net, "w8a8", keep_original=False)
    assert _decibels(_call(net, *args), truth) > W8A8
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
