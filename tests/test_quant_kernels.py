"""Integer kernels against exact integers (T numbers: quantization specification, section 8)."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.ops import native, packing
from fastdiff.quant.activations import dynamic_codes

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="the CPU kernels are not built")

LEVELS = ("baseline", "avx2", "avx512")
SHAPES = ((1, 1, 1), (1, 64, 16), (3, 7, 5), (17, 33, 31), (65, 130, 48), (0, 16, 8), (5, 1030, 19))


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def product(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The sums of the kernel: every scale is 1."""
    one, n = torch.ones(1), weight.shape[0]
    packed, sums = packing.pack(weight), packing.weight_sums(weight)
    return ops.linear_w8a8(x, one, packed, torch.ones(n), sums, n, None, "none", None, None, None, out_dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_T1_T2_products_of_codes_are_exact(shape):
    M, K, N = shape
    x, weight = codes(M, K), codes(N, K)
    want = x.long() @ weight.long().T
    assert torch.equal(product(x, weight).long(), want)  # sums below 2^24 are exact in float32
    offset = (x.long() + 128) @ weight.long().T - 128 * packing.weight_sums(weight).long()
    assert torch.equal(offset, want)


@pytest.mark.parametrize("sign", (1, -1))
def test_T5_the_largest_codes_do_not_saturate(sign):
    x, weight = torch.full((4, 512), 127, dtype=torch.int8), torch.full((32, 512), 127 * sign, dtype=torch.int8)
    assert torch.equal(product(x, weight), torch.full((4, 32), 512.0 * 127 * 127 * sign))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_T1_T5_T11_on_every_instruction_set(level):
    """The tests of this file once more, in a process that is held to the instruction set."""
    here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "T5_the or T1_T2 or T13"]
    done = subprocess.run(here, env=os.environ | {"FASTDIFF_CPU_ISA": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("k", (16, 47, 130, 384))
def test_T7_packing_is_a_bijection_padded_with_zeros(k):
    n = 37
    for weight in (codes(n, k), torch.randn(n, k), torch.randn(n, k).bfloat16()):
        packed = packing.pack(weight)
        assert torch.equal(packing.unpack(packed, n, k), weight)
        assert int((packed != 0).sum()) == int((weight != 0).sum())
    eight = k // 8 * 8
    nibbles = torch.randint(-8, 8, (n, eight), dtype=torch.int8)
    packed = packing.pack_int4(nibbles)
    assert torch.equal(packing.unpack_int4(packed, n, eight), nibbles)
    assert bool((packing.unpack_int4(packed, 48, eight)[n:] == 0).all())
    images = codes(n, 10, 3, 3)
    assert torch.equal(packing.unpack_conv(packing.pack_conv(images, (6, 4)), n, (6, 4), 3), images)


def test_T13_strides_of_the_input_do_not_matter():
    weight = codes(24, 12, 3, 3)
    packed, sums = packing.pack_conv(weight, (12,)), packing.conv_weight_sums(weight, (12,))
    x = torch.randn(2, 12, 9, 8)
    run = lambda pixels: ops.conv2d_w8a8(
        pixels, None, None, None, packed, torch.ones(24), sums, 24, 3, 1, [1] * 4, 1, None, None, None, None, torch.float32
    )  # fmt: skip
    plain = x.permute(0, 2, 3, 1).contiguous()
    last = x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    copied = ops.copy(x.permute(0, 2, 3, 1), torch.float32)
    wide = torch.randn(2, 9, 8, 20)
    wide[..., 3:15] = plain
    part = ops.copy(wide[..., 3:15], torch.float32)
    want = run(plain)
    assert all(torch.equal(run(pixels), want) for pixels in (last, copied, part))
    rows = torch.randn(5, 40)
    w = codes(8, 12)
    cut = ops.linear_w8a8(rows[:, 7:19], None, packing.pack(w), torch.ones(8), packing.weight_sums(w), 8, None, "none",
                          None, None, None, torch.float32)  # fmt: skip
    whole = ops.linear_w8a8(rows[:, 7:19].contiguous(), None, packing.pack(w), torch.ones(8), packing.weight_sums(w), 8,
                            None, "none", None, None, None, torch.float32)  # fmt: skip
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("out", (torch.float32, torch.bfloat16, torch.float16))
def test_T14_the_epilogue_rounds_once(out):
    x, weight = codes(6, 96), codes(20, 96)
    x_scale, scale, bias = torch.rand(6) * 0.01, torch.rand(20) * 0.01, torch.randn(20)
    got = ops.linear_w8a8(x, x_scale, packing.pack(weight), scale, packing.weight_sums(weight), 20, bias, "none", None, None,
                          None, out)  # fmt: skip
    exact = (x.double() @ weight.double().T) * x_scale.double()[:, None] * scale.double() + bias.double()
    # a few units of the last place of float32, of the largest term, before the one rounding to `out`
    size = (exact - bias.double()).abs() + bias.double().abs()
    last = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[out]
    assert bool(((got.double() - exact).abs() <= size * 2.0**-22 + exact.abs() * last * 1.0001 + 1e-7).all())


def test_T15_sums_beyond_float16_are_scaled_before_they_are_rounded():
    x, weight = torch.full((2, 64), 127, dtype=torch.int8), torch.full((16, 64), 127, dtype=torch.int8)
    scale = torch.full((16,), 1e-4)
    got = ops.linear_w8a8(x, torch.full((2,), 1e-2), packing.pack(weight), scale, packing.weight_sums(weight), 16, None, "none",
                          None, None, None, torch.float16)  # fmt: skip
    assert 64 * 127 * 127 > 65504
    torch.testing.assert_close(got, torch.full((2, 16), 64 * 127 * 127 * 1e-6).half())


def test_T46_rows_do_not_see_each_other():
    x, weight = torch.randn(9, 100), codes(24, 100)
    run = lambda rows: ops.linear_w8a8(rows, None, packing.pack(weight), torch.ones(24), packing.weight_sums(weight), 24, None,
                                       "none", None, None, None, torch.float32)  # fmt: skip
    together, order = run(x), torch.randperm(9)
    assert torch.equal(run(x[order]), together[order]) and torch.equal(run(x[3:4]), together[3:4])


def near_tie(values: torch.Tensor) -> torch.Tensor:
    return ((values - values.floor()) - 0.5).abs() < 1e-3


@pytest.mark.parametrize("form", ("group", "layer"))
def test_T47_norms_that_write_codes_round_the_exact_value(form):
    torch.manual_seed(0)
    if form == "group":
        x, weight, bias = torch.randn(2, 8, 8, 32), torch.randn(32), torch.randn(32)
        scale = torch.tensor([0.02])
        got = ops.group_norm(x, None, 8, weight, bias, 1e-5, "silu", None, None, scale, torch.int8)
        wide = F.group_norm(x.permute(0, 3, 1, 2).double(), 8, weight.double(), bias.double(), 1e-5)
        exact = F.silu(wide).permute(0, 2, 3, 1) / scale.double()
    else:
        x, shift, gain = torch.randn(2, 30, 48), torch.randn(2, 48), torch.randn(2, 48)
        got, scales = ops.norm_modulate_int8(x, "layer", None, None, 1e-6, shift, gain)
        wide = F.layer_norm(x.double(), (48,), eps=1e-6) * (1 + gain.double()[:, None]) + shift.double()[:, None]
        exact = wide / (wide.abs().amax(-1, keepdim=True) / 127)
        torch.testing.assert_close(scales.double(), wide.abs().amax(-1) / 127, rtol=1e-5, atol=0)
    want = exact.round().clamp(-127, 127)
    differs = got.double() != want
    assert bool(((got.double() - want).abs() <= 1).all()) and bool(near_tie(exact)[differs].all())


def test_T47_activations_in_front_of_codes():
    x = torch.randn(40, 64) * 3
    exact = F.gelu(x.double(), approximate="tanh")
    got, scale = dynamic_codes(ops.activate(x, "gelu_tanh"))
    steps = exact / (exact.abs().amax(-1, keepdim=True) / 127)
    differs = got.double() != steps.round()
    assert bool(((got.double() - steps.round()).abs() <= 1).all()) and bool(near_tie(steps)[differs].all())
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1) / 127, rtol=1e-5, atol=0)
