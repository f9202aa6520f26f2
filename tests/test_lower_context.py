"""`accelerate` on transformers that read a text: their own numbers in every mode, and their own forward where it must be."""

import copy

import pytest
import torch
from context_networks import NETWORKS, TOKENS, predict, truth
from joint_networks import JOINT

import fastdiff
from fastdiff.ops import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

SIGNAL = {"bf16": 45.0, "w8a8": 35.0}  # to noise, dB
EVERY = NETWORKS | JOINT
MAIN = (
    "pixart-sigma",
    "wan",
    "ltx",
    "sana",
    "sd3.5",
    "flux-guided",
)  # of each family; what the others add is in their numbers
every_network = pytest.mark.parametrize("network", EVERY.values(), ids=EVERY)
every_family = pytest.mark.parametrize(
    "network",
    [pytest.param(net, id=name, marks=() if name in MAIN else pytest.mark.slow) for name, net in EVERY.items()],
)


def _error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _signal(got, expected):
    return (10 * torch.log10(expected.square().mean() / (got - expected).square().mean())).item()


def _fused(net) -> int:
    return fastdiff.report(net).calls.get("fused", 0)


@every_network
def test_exact_mode_is_as_exact_as_the_module(network):
    net = network.build()
    calls = [network.call(rows, size, seed=rows) for size in network.sizes for rows in (1, 2, 3)]
    own, wide = [predict(net, call) for call in calls], [truth(net, call) for call in calls]
    fastdiff.accelerate(net, "exact", strict=True)
    for call, expected, exact in zip(calls, own, wide, strict=True):
        got = predict(net, call)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert _error(got, expected) < 1e-5
        assert _error(got.double(), exact) < 2 * _error(expected.double(), exact) + 1e-6


@pytest.mark.parametrize("mode", SIGNAL)
@every_family
def test_other_modes_keep_the_signal(network, mode):
    net = network.build()
    calls = [network.call(rows, size, seed=rows) for size in network.sizes for rows in (1, 3)]
    own = [predict(net, call) for call in calls]
    fastdiff.accelerate(net, mode, strict=True)
    for call, expected in zip(calls, own, strict=True):
        first, again = predict(net, call), predict(net, call)
        assert torch.equal(first, again)
        assert SIGNAL[mode] < _signal(first, expected) < 80


@every_family
def test_undo_restores_everything(network):
    net, call = network.build(), network.call()
    before, state, keys = predict(net, call), copy.deepcopy(net.state_dict()), set(net.__dict__)
    predict(fastdiff.accelerate(net, "w8a8"), call)
    fastdiff.undo(net)
    assert set(net.__dict__) == keys and torch.equal(predict(net, call), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@every_family
def test_weights_and_contexts_that_change_are_noticed(network):
    net = fastdiff.accelerate(network.build(), "exact")
    predict(net, network.call())
    texts = network.call() | {"encoder_hidden_states": torch.randn(2, TOKENS, 16)}
    other = {"changed text": texts, "another seed": network.call(seed=1), "the first again": network.call()}
    for what, call in other.items():
        assert _error(predict(net, call), predict(network.build(), call)) < 1e-5, what
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    own = predict(fastdiff.undo(copy.deepcopy(net)), texts)
    assert _error(predict(net, texts), own) < 1e-5 < _error(predict(network.build(), texts), own)
    assert set(fastdiff.report(net).calls) == {"fused"}


@pytest.mark.parametrize("mode", ("exact", "w8a8"))
@every_family
def test_rows_do_not_depend_on_the_batch(network, mode):
    net, call = fastdiff.accelerate(network.build(), mode, exact_time=False), network.call(3)
    whole = predict(net, call)
    for row in range(3):
        has_rows = lambda v: isinstance(v, torch.Tensor) and len(v) == 3
        one = {k: v[row : row + 1] if has_rows(v) else v for k, v in call.items()}
        if "added_cond_kwargs" in call:
            one["added_cond_kwargs"] = {k: v[row : row + 1] for k, v in call["added_cond_kwargs"].items()}
        assert torch.equal(predict(net, one)[0], whole[row])


MASKED = {name: network for name, network in NETWORKS.items() if "encoder_attention_mask" in network.call()}


@pytest.mark.parametrize("network", MASKED.values(), ids=MASKED)
def test_masks_in_every_form(network):
    net, call = network.build(), network.call(3)
    mask = call["encoder_attention_mask"]
    bias = (1 - mask[:, None]) * -10000.0
    weak = torch.randn(3, 1, TOKENS)
    nothing = mask * torch.tensor([0.0, 1.0, 1.0])[:, None]
    forms = {"bias": bias, "integer": mask.long(), "weak": weak, "none": None, "all": mask * 0 + 1, "nothing": nothing}
    calls = {name: call | {"encoder_attention_mask": form} for name, form in forms.items()}
    own = {name: predict(net, one) for name, one in calls.items()}
    fastdiff.accelerate(net, "exact", strict=True)
    for name, one in calls.items():
        assert _error(predict(net, one), own[name]) < (1e-5 if name != "nothing" else 2e-3), (
            name
        )  # scores near -1e4 have steps of 1e-3
    hidden = call | {"encoder_hidden_states": torch.where(mask[..., None] > 0, call["encoder_hidden_states"], 1e3)}
    assert torch.equal(predict(net, hidden), predict(net, call))


def test_long_texts_are_cut_where_no_row_goes_on():
    network = NETWORKS["pixart-sigma"]
    net, call = network.build(), network.call()
    call["encoder_hidden_states"] = torch.randn(2, 120, 16)
    call["encoder_attention_mask"] = (torch.arange(120) < torch.tensor([[40], [3]])).float()
    own = predict(net, call)
    assert _error(predict(fastdiff.accelerate(net), call), own) < 1e-5
    from fastdiff.models.lower.context import read_text

    text, bias = read_text(call["encoder_hidden_states"], call["encoder_attention_mask"], 2, 16)
    assert text.shape == (2, 64, 16) and bias.shape == (2, 1, 64)


@pytest.mark.parametrize("name, tokens", (("wan", 36), ("ltx", 30)))
def test_timesteps_of_tokens_may_be_the_same(name, tokens):
    net, call = NETWORKS[name].build(), NETWORKS[name].call()
    call["timestep"] = call["timestep"][:, None].expand(2, tokens)
    own = predict(net, call)
    assert _error(predict(fastdiff.accelerate(net, strict=True), call), own) < 1e-5


FALLBACKS = (
    ("pixart-sigma", {"attention_mask": torch.ones(2, 16)}, "attention_mask"),
    ("pixart-sigma", {"cross_attention_kwargs": {"gligen": None}}, "cross_attention_kwargs"),
    ("pixart-sigma", {"hidden_states": torch.randn(2, 4, 9, 8)}, "multiples of 2"),
    ("wan", {"timestep": 500 * (torch.arange(36) > 5).expand(2, 36)}, "different timesteps"),
    ("wan", {"hidden_states": torch.randn(2, 4, 3, 6, 9)}, "multiples of 2"),
    ("ltx", {"timestep": 500 * (torch.arange(30) > 5).expand(2, 30)}, "different timesteps"),
)


@pytest.mark.parametrize("name, change, reason", FALLBACKS)
def test_what_is_not_lowered_runs_the_modules_own_forward(name, change, reason):
    net, call = NETWORKS[name].build(), NETWORKS[name].call() | change
    own = predict(net, call)
    fastdiff.accelerate(net, "w8a8")
    assert torch.equal(predict(net, call), own)
    assert [why for why in fastdiff.report(net).calls if reason in why] and not _fused(net)
    predict(net, NETWORKS[name].call())
    assert _fused(net) == 1


UNKNOWN = (
    ("wan", {"image_dim": 8, "added_kv_proj_dim": 48}, "image embedder"),
    ("wan", {"patch_size": (2, 2, 2)}, "patches of"),
    ("pixart-sigma", {"attention_type": "gated"}, "not a block of PixArt"),
)


@pytest.mark.parametrize("name, changes, reason", UNKNOWN)
def test_other_architectures_are_named(name, changes, reason):
    with pytest.raises(RuntimeError, match=reason):
        fastdiff.accelerate(NETWORKS[name].build(**changes), strict=True)


@every_family
def test_hooks_and_half_precision(network):
    net, call = network.build(), network.call()
    own = predict(net, call)
    halved = {k: v.bfloat16() if isinstance(v, torch.Tensor) and k == "hidden_states" else v for k, v in call.items()}
    fastdiff.accelerate(net, "exact")
    got = predict(net, halved)
    assert got.dtype == torch.bfloat16 and _error(got.float(), own) < 3e-2
    first = next(child for name, child in net.named_modules() if name.endswith(".0"))
    handle = first.register_forward_hook(lambda *args: None)
    predict(net, call)
    assert any("hooks" in why for why in fastdiff.report(net).calls)
    handle.remove()
    predict(net, call)
    assert _fused(net) == 2


def test_contexts_that_take_turns_are_encoded_once(monkeypatch):
    from fastdiff.models.lower import encoded

    runs = []
    monkeypatch.setattr(encoded.Program, "run", lambda self, run=encoded.Program.run: (runs.append(self), run(self)))
    net = fastdiff.accelerate(NETWORKS["wan"].build(), "exact")
    calls = [NETWORKS["wan"].call(seed=seed) for seed in range(3)]
    truths = [predict(NETWORKS["wan"].build(), call) for call in calls]
    for turn in (0, 1, 0, 1, 2, 1, 2, 0):
        assert _error(predict(net, calls[turn]), truths[turn]) < 1e-5
    places = {id(program) for _, program in next(iter(net._fastdiff._contexts._places.values()))}
    assert (
        len(places) == 2 and sum(id(program) in places for program in runs) == 2
    )  # for the third, and the first again


@every_family
def test_bfloat16_modules_lose_no_more_than_their_own(network):
    net, call = network.build(), network.call(3)
    truth, half = predict(net, call), net.bfloat16()
    call = {
        k: v.bfloat16() if k in ("hidden_states", "encoder_hidden_states", "pooled_projections") else v
        for k, v in call.items()
    }
    own = predict(half, call)
    got = predict(fastdiff.accelerate(half, "exact", strict=True), call)
    assert got.dtype == torch.bfloat16 and _signal(got.float(), truth) > _signal(own.float(), truth) - 1


@every_family
def test_original_weights_can_be_given_up(network):
    net, call = network.build(), network.call()
    own = predict(net, call)
    weights = sum(p.nbytes for p in net.parameters())
    fastdiff.accelerate(net, "w8a8", keep_original=False)
    assert _signal(predict(net, call), own) > SIGNAL["w8a8"]
    assert sum(p.nbytes for p in net.parameters() if p.device.type != "meta") < 0.6 * weights
