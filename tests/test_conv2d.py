"""Convolutions: exact integers, equal bits at every level, thread count and batch, and the packed layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import backend, conv2d, conv2d_w8a8, native, onednn
from fastdiff.ops.conv2d_samples import SHAPES, make_call, make_int8_call
from fastdiff.ops.packing import conv_weight_sums, pack_conv, unpack_conv

LEVELS = ("baseline", "avx2", "avx512", "amx")
SCRIPT = Path(__file__).parent / "native" / "conv2d.py"
needs_native = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


def _known_levels() -> tuple[str, ...]:
    return LEVELS[: LEVELS.index(native.cpu().isa_detected()) + 1]


def _script(*args, isa: str) -> str:
    environment = {**os.environ, "FASTDIFF_CPU_ISA": isa, "FASTDIFF_BACKEND": ""}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:] or done.returncode
    return done.stdout


def _hashes(threads: int, isa: str) -> dict:
    out = json.loads(_script("digest", threads, isa=isa))
    assert out["isa"] == isa
    return out["hashes"]


@pytest.fixture(scope="module")
def hashes() -> dict:
    return _hashes(1, _known_levels()[-1])


def _integers(x: torch.Tensor, weight: torch.Tensor, stride: int, padding) -> torch.Tensor:
    """int64 sums [B, Ho, Wo, N] of int8 images [B, H, W, C] and weights [N, C, k, k], by loops over the taps."""
    kernel = weight.shape[2]
    padded = F.pad(x.long().permute(0, 3, 1, 2), padding)
    height, width = ((padded.shape[i] - kernel) // stride + 1 for i in (2, 3))
    total = torch.zeros(x.shape[0], height, width, weight.shape[0], dtype=torch.int64)
    for y in range(kernel):
        for z in range(kernel):
            taps = padded[:, :, y : y + height * stride : stride, z : z + width * stride : stride][
                :, :, :height, :width
            ]
            total += taps.permute(0, 2, 3, 1) @ weight[:, :, y, z].long().T
    return total


def _integer_call(x, weight, stride=1, padding=(1, 1, 1, 1), scale=1.0):
    n, c, kernel, _ = weight.shape
    ones = torch.full((n,), scale)
    packed, sums = pack_conv(weight, (c,)), conv_weight_sums(weight, (c,))
    rest = (None, None, None, None, torch.float32)
    return x, torch.ones(1), None, None, packed, ones, sums, n, kernel, stride, list(padding), 1, *rest


def _codes(generator, *shape) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


@needs_native
@pytest.mark.parametrize("seed", range(24))
def test_integer_sums_are_exact(seed):
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    kernel, stride = (1, 2, 3, 5)[seed % 4], pick(1, 3)
    padding = tuple(pick(0, 3) for _ in range(4))
    x = _codes(g, pick(1, 4), pick(kernel, 12), pick(kernel, 12), pick(1, 70))
    weight = _codes(g, pick(1, 90), x.shape[3], kernel, kernel)
    want = _integers(x, weight, stride, padding)
    with backend("cpu"):
        got = conv2d_w8a8(*_integer_call(x, weight, stride, padding))
    assert torch.equal(got.double(), want.float().double())


@needs_native
@pytest.mark.parametrize("sign", (-1, 1))
def test_largest_sums_do_not_overflow(sign):
    # 14700 channels under 9 taps: 2 133 871 500 of at most 2 147 483 647
    x = torch.full((1, 3, 3, 14700), sign * 127, dtype=torch.int8)
    weight = torch.full((17, 14700, 3, 3), 127, dtype=torch.int8)
    with backend("cpu"):
        got = conv2d_w8a8(*_integer_call(x, weight))
    assert abs(got[0, 1, 1, 3].item() - sign * 127 * 127 * 9 * 14700) <= 64  # half of float32's step there
    assert torch.equal(got, _integers(x, weight, 1, (1, 1, 1, 1)).float())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8))
@pytest.mark.parametrize("channels", ((5,), (8,), (3, 6), (4, 1)))
def test_packed_weights_lie_as_documented(dtype, channels):
    weight = torch.arange(1, 19 * sum(channels) * 9 + 1).view(19, sum(channels), 3, 3) % 120
    weight = weight.to(dtype)
    packed = pack_conv(weight, channels)
    group = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[dtype]
    k = 0
    for first, count in zip((0, channels[0]), channels, strict=False):
        for y in range(3):
            for z in range(3):
                for c in range(-(-count // group) * group):
                    want = weight[18, first + c, y, z] if c < count else torch.zeros((), dtype=dtype)
                    assert packed[1, k // group, 2, k % group] == want
                    k += 1
    assert packed.shape == (2, k // group, 16, group)
    assert torch.equal(unpack_conv(packed, 19, channels, 3), weight)
    if dtype == torch.int8:
        sums = conv_weight_sums(weight, channels)
        assert torch.equal(sums[0, 5], weight[:, : channels[0], 1, 2].sum(1).int())
        assert torch.equal(sums.sum((0, 1)), weight.long().sum((1, 2, 3)).int())


@needs_native
@pytest.mark.parametrize("isa", LEVELS)
def test_int8_bits_are_the_same_at_every_level(isa, hashes):
    if isa not in _known_levels():
        pytest.skip(f"this CPU does not run {isa}")
    assert _hashes(2, isa)["conv2d_w8a8"] == hashes["conv2d_w8a8"]


@needs_native
@pytest.mark.parametrize("threads", (2, 3))
def test_bits_do_not_depend_on_the_number_of_threads(threads, hashes):
    assert _hashes(threads, _known_levels()[-1]) == hashes


@needs_native
@pytest.mark.parametrize("isa", [LEVELS[-1], *(pytest.param(isa, marks=pytest.mark.slow) for isa in LEVELS[:-1])])
def test_nothing_is_touched_past_a_buffer(isa):
    isa = _known_levels()[-1] if isa == LEVELS[-1] else isa
    if isa not in _known_levels():
        pytest.skip(f"this CPU does not run {isa}")
    assert int(_script("guard", isa=isa)) > 200


@needs_native
@pytest.mark.parametrize("weights", (torch.float32, torch.bfloat16, torch.int8))
def test_bits_of_a_sample_do_not_depend_on_the_batch(weights):
    op, make, own = conv2d, lambda *a, **k: make_call(*a, weights=weights, **k), (0, 1, 9, 10)
    if weights == torch.int8:
        op, make, own = conv2d_w8a8, make_int8_call, (0, 2, 13, 14)
    for seed, shape in enumerate((*SHAPES[3:11], SHAPES[18], (5, 13, 11, 200, 0, 70, 3, 1, (1, 1, 1, 1), 1))):
        args = make((5, *shape[1:]), torch.float32, seed=seed)
        with backend("cpu"):
            together = op(*args)
            for b in range(5):
                of_sample = [a[b : b + 1] if i in own and a is not None else a for i, a in enumerate(args)]
                assert torch.equal(op(*of_sample)[0], together[b])


@needs_native
def test_a_nan_spoils_what_sees_it_and_nothing_else():
    args = list(make_call((2, 8, 9, 5, 0, 20, 3, 1, (1, 1, 1, 1), 1), seed=3))
    args[0][1, 4, 5, 2] = float("nan")
    with backend("cpu"):
        got = conv2d(*args).isnan()
    want = torch.zeros_like(got)
    want[1, 3:6, 4:7] = True
    assert torch.equal(got, want)


@needs_native
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_a_sample_that_cannot_be_quantized_is_nan(value):
    args = list(make_int8_call((3, 8, 9, 5, 0, 20, 3, 1, (1, 1, 1, 1), 1), seed=3))
    with backend("cpu"):
        clean = conv2d_w8a8(*args)
        args[0][1, 4, 5, 2] = value
        got = conv2d_w8a8(*args)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@needs_native
def test_dynamic_codes_err_by_half_a_step_at_most():
    """Against the float convolution: each of the K products errs by at most scale / 2 * |weight|."""
    args = make_int8_call((2, 10, 10, 24, 0, 32, 3, 1, (1, 1, 1, 1), 1), seed=2)
    x, weight, scale = args[0], args[4], args[5]
    wide = unpack_conv(weight, 32, (24,), 3).double() * scale.double()[:, None, None, None]
    plain = F.conv2d(x.permute(0, 3, 1, 2).double(), wide, padding=1).permute(0, 2, 3, 1)
    with backend("cpu"):
        got = conv2d_w8a8(*args[:12], None, None, None, None, torch.float32).double()
    step = x.abs().amax(dim=(1, 2, 3)).double() / 127
    bound = step[:, None, None, None] / 2 * wide.abs().sum((1, 2, 3))
    assert ((got - plain).abs() <= bound * 1.001).all()
    assert (got - plain).abs().max() > bound.max() / 100  # it is quantized at all


@needs_native
def test_strided_embeddings_and_in_place_views_are_read_where_they_lie():
    args = list(make_call(SHAPES[3], seed=5))
    wide = torch.randn(3, 96)
    with backend("cpu"):
        args[9] = wide[:, 32:64]
        strided = conv2d(*args)
        args[9] = wide[:, 32:64].contiguous()
        assert torch.equal(strided, conv2d(*args))


@pytest.mark.parametrize(
    "index, value, message",
    (
        (0, torch.zeros(2, 5, 7, 13, dtype=torch.float64), "x must be one of"),
        (0, torch.zeros(2, 13, 5, 7).permute(0, 2, 3, 1), "contiguous"),
        (1, torch.zeros(2, 5, 6, 1), "one B, H, W"),
        (2, torch.zeros(2, 5, 16, 1), "pack_conv"),
        (4, 99, "larger than the padded image"),
        (5, 0, "stride must be >= 1"),
        (6, [1, 1, 1], "four numbers"),
        (7, 3, "upsample 1 or 2"),
        (8, torch.zeros(16), "bias must be"),
        (8, torch.zeros(17, dtype=torch.float64), "bias must be float32"),
        (10, torch.zeros(2, 5, 7, 16), "residual must be"),
        (11, torch.int8, "out_dtype"),
    ),
)
def test_bad_arguments_are_refused_with_a_sentence(index, value, message):
    args = list(make_call(SHAPES[2]))
    args[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        conv2d(*args)


@pytest.mark.parametrize(
    "index, value, message",
    (
        (1, None, "x_scale expected for int8"),
        (1, torch.ones(3), r"float32 \[1\] or \[2\]"),
        (5, torch.ones(16), "weight_scale must be"),
        (6, torch.ones(17), "weight_sum must be"),
        (15, torch.ones(1), "int8 with an out_scale"),
        (16, torch.int8, "int8 with an out_scale"),
    ),
)
def test_bad_quantization_is_refused_with_a_sentence(index, value, message):
    args = list(make_int8_call(SHAPES[2], torch.int8))
    args[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        conv2d_w8a8(*args)


@pytest.mark.skipif(onednn.onednn_missing() is not None, reason="no oneDNN")
def test_onednn_repacks_weights_that_were_written_to():
    x, packed = torch.randn(2, 3, 4, 20), pack_conv(torch.randn(16, 20, 1, 1), (20,))
    call = (x, None, packed, 16, 1, 1, [0] * 4, 1, None, None, None, torch.float32)
    with backend("onednn"):
        first, kept = conv2d(*call), len(onednn._kept)
        packed.mul_(2)
        assert torch.equal(conv2d(*call), 2 * first) and len(onednn._kept) == kept
        del call, packed
        assert len(onednn._kept) == kept - 1  # it goes with the weight
