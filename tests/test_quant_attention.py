"""Attention on codes (T numbers: section 8 of the quantization specification)."""

import pytest
import torch
from quant_networks import SPARED, inputs, output, tiny_dit
from torch.nn import functional as F

import fastdiff
from fastdiff.quant import QuantConfig, Scheme, TensorSpec, quantize
from fastdiff.quant.attention import IntegerAttention, attention_int8, probabilities_u8, smooth_keys
from fastdiff.quant.measures import sqnr_db
from fastdiff.quant.state import from_tensors, to_tensors


# measured on 64 rows of normal logits: the worst temperature is 2, at 38.0, 33.8 and 29.6 dB
@pytest.mark.parametrize("length,floor", [(256, 37), (1024, 33), (4096, 29)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_T48_probabilities_relative_to_the_row_maximum(length, floor, temperature):
    logits = torch.randn(64, length) * temperature
    v = torch.randn(length, 64)
    codes, sums = probabilities_u8(logits)
    exact = torch.softmax(logits.double(), -1)
    want, got = exact @ v.double(), (codes.double() @ v.double()) / sums.double()
    assert sqnr_db(want, got) >= floor
    assert bool((codes.amax(-1) == 255).all())
    assert float((exact - codes / sums.double()).abs().mul(sums).max()) <= 0.5001
    if temperature >= 1 and length >= 1024:  # one scale for all normalised probabilities is far worse
        top = float(exact.max())
        naive = (exact / top * 255).round() * top / 255
        assert sqnr_db(want, got) >= sqnr_db(want, naive @ v.double()) + 5


def test_T49_the_mean_of_the_keys_changes_nothing():
    q, k = torch.randn(3, 7, 16, dtype=torch.float64), torch.randn(3, 9, 16, dtype=torch.float64) + 5
    want = torch.softmax(q @ k.transpose(1, 2), -1)
    got = torch.softmax(q @ smooth_keys(k).transpose(1, 2), -1)
    assert float((got - want).abs().max()) <= 1e-12


def test_integer_attention_is_near_the_exact_one():
    q, k, v = (torch.randn(2, 40, 32) for _ in range(3))
    k = k + 4 * torch.randn(32)  # a mean that smoothing removes
    want = torch.softmax((q.double() @ k.double().transpose(1, 2)) * 0.25, -1) @ v.double()
    assert sqnr_db(want, attention_int8(q, k, v, 0.25)) >= 30


def test_T58_spared_first_token_is_exact():
    q, k, v = torch.randn(2, 6, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    k[:, 0] *= 60
    v[:, 0] *= 60
    want = torch.softmax((q.double() @ k.double().transpose(1, 2)) * 0.1, -1) @ v.double()
    plain, spared = attention_int8(q, k, v, 0.1), attention_int8(q, k, v, 0.1, spared=1)
    assert sqnr_db(want, spared) >= sqnr_db(want, plain) and sqnr_db(want, spared) >= 30
    alone = attention_int8(q, k[:, :1], v[:, :1], 0.1, spared=1)  # only the spared token: its value itself
    assert torch.equal(alone, v[:, :1].expand(2, 6, 16))


def test_a_network_is_quantized_with_its_attention():
    net, data = tiny_dit(), inputs("dit")
    config = QuantConfig(Scheme(TensorSpec("int8")), spared=SPARED)
    quantize(net, config)
    plain = output(net, data)
    net = tiny_dit()
    made = quantize(net, QuantConfig(config.default, spared=SPARED, attention="int8"), keep_originals=True)
    got = output(net, data)
    assert 30 < sqnr_db(plain, got) < 100 and not torch.overrides._get_current_function_mode_stack()
    again = tiny_dit()
    saved, _, settings = to_tensors(made)
    from_tensors(again, settings, saved)
    assert torch.equal(output(again, data), got)
    fastdiff.accelerate(again, strict=True)  # takes the network's own precision over
    assert sqnr_db(got, output(again, data)) > sqnr_db(plain, got) + 3
    assert torch.equal(output(made.undo(), data), output(tiny_dit(), data)) and not hasattr(net, "attention_precision")


def test_integer_attention_serves_what_the_op_can():
    q, k, v = (torch.randn(2, 3, 20, 16) for _ in range(3))
    mask = torch.rand(20, 20) > 0.3
    for settings in ({}, {"attn_mask": mask}, {"is_causal": True}, {"scale": 0.1}):
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **settings)
        with IntegerAttention():
            got = F.scaled_dot_product_attention(q, k, v, **settings)
            own = (
                F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
                F.scaled_dot_product_attention(q[0], k[0], v[0]),
            )
        assert 30 < sqnr_db(want, got.double()) < 100
        torch.testing.assert_close(own[1], F.scaled_dot_product_attention(q[0], k[0], v[0]))
