"""`accelerate` on the encoders of T5 and UMT5: their own numbers in every mode, and their own forward where it must be."""

import copy

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.ops import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

SIGNAL = {"bf16": 42.0, "w8a8": 31.0}  # to noise, dB
KINDS = ("T5", "UMT5")


def _encoder(kind: str, **changes) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=60, d_model=40, d_kv=12, d_ff=96, num_layers=3, num_heads=4)
    config = {**shape, "feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 40, **changes}
    net = getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**config))
    for p in net.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3)
    return net.eval()


def _text(rows: int = 2, tokens: int = 70) -> dict:
    """Texts of different lengths, padded at their end."""
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.tensor([tokens // 3, tokens, 1])[:rows, None]
    ids = torch.randint(0, 60, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()}


def _encode(net: nn.Module, **call) -> torch.Tensor:
    with torch.no_grad():
        return net(**call)[0]


def _error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_exact_mode_is_as_exact_as_the_module(kind):
    net = _encoder(kind)
    calls = [_text(), _text(3, 17), {"input_ids": _text(1, 33)["input_ids"]}, _text()]
    own, wide = ([_encode(n, **call) for call in calls] for n in (net, copy.deepcopy(net).double()))
    fastdiff.accelerate(net, "exact", strict=True)
    for call, expected, exact in zip(calls, own, wide, strict=True):
        got = _encode(net, **call)
        assert got.shape == expected.shape and got.dtype == expected.dtype and _error(got, expected) < 1e-5
        assert _error(got.double(), exact) < 2 * _error(expected.double(), exact) + 1e-6


@pytest.mark.parametrize("mode", SIGNAL)
@pytest.mark.parametrize("kind", KINDS)
def test_other_modes_keep_the_signal(kind, mode):
    net, call = _encoder(kind), _text(3)
    own = _encode(net, **call)
    got = _encode(fastdiff.accelerate(net, mode, strict=True), **call)
    assert torch.equal(_encode(net, **call), got)
    assert SIGNAL[mode] < 10 * torch.log10(own.square().mean() / (got - own).square().mean()) < 80


def test_undo_and_changed_weights():
    net, call = _encoder("T5"), _text()
    before, keys = _encode(net, **call), set(net.__dict__)
    fastdiff.accelerate(net, "exact")
    with torch.no_grad():
        net.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(3)
    changed = _encode(net, **call)
    fastdiff.undo(net)
    assert set(net.__dict__) == keys and _error(changed, _encode(net, **call)) < 1e-5 < _error(changed, before)


def test_results_have_the_modules_own_form():
    net, call = _encoder("T5"), _text()
    with torch.no_grad():
        own, pair = net(**call), net(**call, return_dict=False)
        fastdiff.accelerate(net, "exact", strict=True)
        got, ours = net(**call), net(**call, return_dict=False)
    assert type(got) is type(own) and got.keys() == own.keys()
    assert type(ours) is type(pair) and len(ours) == len(pair)
    embedded = net.shared(call["input_ids"]).detach()
    assert torch.equal(_encode(net, inputs_embeds=embedded, attention_mask=call["attention_mask"]), got[0])


FALLBACKS = (
    ({"attention_mask": _text()["attention_mask"].flip(1)}, "more than the end"),
    ({"attention_mask": torch.zeros(2, 70)}, "more than the end"),
    ({"output_hidden_states": True}, "output_hidden_states"),
)


@pytest.mark.parametrize("change, reason", FALLBACKS)
def test_what_is_not_lowered_runs_the_modules_own_forward(change, reason):
    net, call = fastdiff.accelerate(_encoder("T5"), "w8a8"), _text() | change
    assert torch.equal(_encode(net, **call), _encode(_encoder("T5"), **call))
    assert [why for why in fastdiff.report(net).calls if reason in why]


def test_other_feed_forward_layers_are_named():
    with pytest.raises(RuntimeError, match="DenseReluDense is a T5DenseActDense"):
        fastdiff.accelerate(_encoder("T5", feed_forward_proj="relu"), strict=True)


def test_originals_can_be_given_up():
    net, call = _encoder("T5"), _text()
    own = _encode(net, **call)
    fastdiff.accelerate(net, "w8a8", keep_original=False)
    assert _error(_encode(net, **call), own) < 0.1
    kept = sum(p.nbytes for p in net.encoder.block.parameters() if p.device.type != "meta")
    assert kept < 4000, "norms and the position bias only"
