"""UNets, calls and changes that the fused kernels do not know: the module's own forward runs, and the report says why."""

import pytest
import torch
from torch import nn
from unet_networks import EXACT, call, calls_of, conditional_unet, inputs_of, plain_unet, relative_error

import fastdiff
from fastdiff.ops import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


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
    net, plain = conditional_unet(), conditional_unet()
    args, _ = inputs_of(net)
    fastdiff.accelerate(net, "exact")
    call(net, *args)
    change(net)
    change(plain)
    truth = call(plain, *args)
    assert torch.equal(call(net, *args), truth)
    calls = calls_of(net)
    assert calls.pop("fused") == 1 and list(calls.values()) == [1]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_changed_before_is_not_lowered(change):
    net, plain = conditional_unet(), conditional_unet()
    args, _ = inputs_of(net)
    change(net)
    change(plain)
    fastdiff.accelerate(net, "exact")
    assert relative_error(call(net, *args), call(plain, *args)) < EXACT
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
    net, plain = conditional_unet(), conditional_unet()
    args, _ = inputs_of(net)
    named = extra(net)
    fastdiff.accelerate(net, "w8a8")
    try:
        truth = call(plain, *args, **named)
    except Exception as error:  # the module itself refuses some of these for a network this small
        with pytest.raises(type(error)):
            call(net, *args, **named)
    else:
        assert torch.equal(call(net, *args, **named), truth)
    (reason,) = calls_of(net)
    assert "not lowered" in reason


@pytest.mark.parametrize("size", ((7, 10), (9, 9), (3, 5), (1, 6)))
def test_sizes_that_do_not_halve(size):
    shape = dict(
        block_out_channels=(32, 32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    )
    net = conditional_unet(**shape, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    args, _ = inputs_of(net, size=size)
    truth = call(net, *args)
    assert relative_error(call(fastdiff.accelerate(net, "exact", strict=True), *args), truth) < EXACT


def test_sizes_that_padding_cannot_serve_take_the_modules_own_way():
    net, plain = conditional_unet(downsample_padding=0), conditional_unet(downsample_padding=0)
    args, _ = inputs_of(net, size=(7, 10))
    fastdiff.accelerate(net, "w8a8")
    assert torch.equal(call(net, *args), call(plain, *args))
    assert calls_of(net) == {"sizes are not multiples of 2": 1}


def test_active_dropout_takes_the_modules_own_way():
    net = plain_unet(dropout=0.5)
    args, _ = inputs_of(net)
    fastdiff.accelerate(net, "exact")
    call(net, *args)
    net.train()
    first, second = call(net, *args), call(net, *args)
    assert not torch.equal(first, second)
    assert calls_of(net) == {"fused": 1, "dropout is active": 2}


UNSUPPORTED = {
    "center_input_sample": (plain_unet, dict(center_input_sample=True)),
    "divided by the timestep": (plain_unet, dict(time_embedding_type="fourier")),
    "downsamplers.0 is a ResnetBlock2D": (
        plain_unet,
        dict(down_block_types=("AttnDownBlock2D", "DownBlock2D"), downsample_type="resnet"),
    ),
    "SkipDownBlock2D": (plain_unet, dict(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"))),
    "scales its result": (plain_unet, dict(mid_block_scale_factor=2.0)),
    "activation": (plain_unet, dict(act_fn="gelu")),
    "addition_embed_type": (conditional_unet, dict(addition_embed_type="text", addition_embed_type_num_heads=2)),
    "SimpleCrossAttnDownBlock2D": (
        conditional_unet,
        dict(
            down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        ),
    ),
    "DualTransformer2DModel": (conditional_unet, dict(dual_cross_attention=True)),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_other_architectures_are_not_lowered(reason):
    make, changes = UNSUPPORTED[reason]
    net = fastdiff.accelerate(make(**changes), "exact")
    found = fastdiff.report(net)
    assert not found.lowered and reason in found.layers[0].reason
