"""The memory-bound CPU ops: equal bits whatever the machine and the batch, exact rules, no digit lost to a large mean."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.ops import OPS, backend, native
from fastdiff.program import Program

HERE = Path(__file__).parent / "native"
NAMES = (
    *("copy", "norm_modulate", "norm_modulate_int8", "gated_norm_modulate", "group_norm", "group_norm_nchw"),
    *("quantize_rows", "activate", "geglu", "resample", "qk_norm_rope"),
)
LEVELS = ("baseline", "avx2", "avx512", "amx")
# rounded to bfloat16, they have a shorter way on AVX512
ACTIVATED = tuple(f"{name} bfloat16" for name in ("activate", "geglu", "group_norm", "group_norm_nchw"))

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


def _script(name: str, *args, isa: str = "") -> str:
    environment = {**os.environ, "FASTDIFF_CPU_ISA": isa, "FASTDIFF_BACKEND": ""}
    command = [sys.executable, str(HERE / name), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _cpu(name: str, *args):
    with backend("cpu"):
        return OPS[name](*args)


@pytest.fixture(scope="module")
def digest() -> dict:
    return json.loads(_script("digest.py", 1, *NAMES))["hashes"]


@pytest.mark.parametrize(
    "isa, threads",
    (
        ("baseline", 2),
        pytest.param("avx2", 1, marks=pytest.mark.slow),
        pytest.param("avx2", 3, marks=pytest.mark.slow),
        pytest.param("avx512", 2, marks=pytest.mark.slow),
        pytest.param("avx512", 3, marks=pytest.mark.slow),
        pytest.param("avx512", 7, marks=pytest.mark.slow),
    ),
)
def test_every_level_and_thread_count_gives_the_same_bits(isa, threads, digest):
    if LEVELS.index(isa) > LEVELS.index(native.cpu().isa_detected()):
        pytest.skip(f"this CPU does not run {isa}")
    got = json.loads(_script("digest.py", threads, *NAMES, isa=isa))["hashes"]
    assert got.keys() == digest.keys()
    avx512 = LEVELS.index("avx512")
    same_way = (LEVELS.index(isa) >= avx512) == (LEVELS.index(native.cpu().isa_detected()) >= avx512)
    for name, value in got.items():
        assert value == digest[name] or (name in ACTIVATED and not same_way), name


def test_a_sample_has_the_same_bits_in_every_batch():
    x, vectors = _normal(5, 96, 333), (_normal(5, 333), _normal(5, 333))
    alone = [
        _cpu("norm_modulate", x[b : b + 1], "layer", None, None, 1e-6, *[v[b : b + 1] for v in vectors], torch.float32)
        for b in range(5)
    ]
    assert torch.equal(_cpu("norm_modulate", x, "layer", None, None, 1e-6, *vectors, torch.float32), torch.cat(alone))
    image = _normal(5, 40, 41, 64)
    rest = (8, None, None, 1e-6, "silu", None, None, None, torch.float32)
    alone = [_cpu("group_norm", image[b : b + 1], None, *rest) for b in range(5)]
    assert torch.equal(_cpu("group_norm", image, None, *rest), torch.cat(alone))


@pytest.mark.parametrize("mean, bound", ((0.0, 1e-6), (1e3, 2e-6), (-1e5, 1e-5)))
def test_a_large_mean_costs_no_digits(mean, bound):
    x = _normal(1, 64, 1152) + mean
    wide = x.double()
    truth = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    got = _cpu("norm_modulate", x, "layer", None, None, 1e-6, None, None, torch.float32)
    assert (got - truth).abs().max() < bound * truth.abs().max()
    image = x.view(1, 64, 36, 32)
    groups = image.double().reshape(1, 64 * 36, 4, 8)
    off = groups - groups.mean((1, 3), keepdim=True)
    truth = (off / (off.square().mean((1, 3), keepdim=True) + 1e-6).sqrt()).view(image.shape)
    for got in (
        _cpu("group_norm", image, None, 4, None, None, 1e-6, "none", None, None, None, torch.float32),
        _cpu("group_norm_nchw", image.permute(0, 3, 1, 2).contiguous(), 4, None, None, 1e-6, "none", None, None, None, torch.float32).permute(0, 2, 3, 1),
    ):  # fmt: skip
        assert (got - truth).abs().max() < bound * truth.abs().max()


def test_int8_results_follow_the_static_rule_to_the_bit():
    image, weight, scale = _normal(2, 33, 20, 96), _normal(96), torch.tensor([0.0173])
    rest = (32, weight, None, 1e-5, "silu", None, None)
    exact = _cpu("group_norm", image, None, *rest, None, torch.float32)
    codes = _cpu("group_norm", image, None, *rest, scale, torch.int8)
    assert codes.abs().max() == 127 and codes.unique().numel() == 144
    assert torch.equal(codes, torch.round(exact * (1 / scale)).clamp(-127, 127).to(torch.int8))


def test_fused_ops_have_the_bits_of_their_parts():
    x, y, gate, (shift, scale) = _normal(2, 50, 200), _normal(2, 50, 200).flip(0), _normal(2, 200), _normal(2, 2, 200)
    rest = ("layer", _normal(200), None, 1e-6, shift, scale)
    normed = _cpu("norm_modulate", x, *rest, torch.float32)
    for fused, part in zip(_cpu("norm_modulate_int8", x, *rest), _cpu("quantize_rows", normed), strict=True):
        assert torch.equal(fused, part)
    total, fused = _cpu("gated_norm_modulate", x, y, gate, *rest, torch.float32)
    assert torch.equal(total, x + gate[:, None] * y)
    assert torch.equal(fused, _cpu("norm_modulate", total, *rest, torch.float32))
    assert torch.equal(_cpu("geglu", torch.cat([x, y], -1), "swiglu"), x * _cpu("activate", y, "silu"))


def test_codes_of_rows_have_the_bits_of_the_rule():
    x = _normal(300, 257) * torch.logspace(-30, 30, 300)[:, None]
    codes, scales = _cpu("quantize_rows", x)
    largest = x.abs().amax(1)
    assert torch.equal(scales, largest * torch.tensor(1.0).div(127))
    assert torch.equal(codes, torch.round(x * (127 / largest)[:, None]).clamp(-127, 127).to(torch.int8))


def test_activations_are_exact_over_the_whole_range():
    x = torch.cat(
        [torch.linspace(-30, 30, 200_001), torch.logspace(-20, 20, 20_000), -torch.logspace(-20, 20, 20_000)]
    )
    wide = x.double()
    for kind, approximate in (("gelu", "none"), ("gelu_tanh", "tanh"), ("silu", None)):
        functional = torch.nn.functional
        truth = functional.silu(wide) if approximate is None else functional.gelu(wide, approximate=approximate)
        error = (_cpu("activate", x, kind) - truth).abs() / truth.abs().clamp(min=1)
        # where erf is close to -1, float32 has 6e-8 of it left, which x multiplies
        assert error.max() < (1e-6 if kind == "gelu" else 2e-7), kind


def test_results_past_the_caches_have_the_same_numbers():
    x = _normal(1, 4500, 1024)  # 18 MB
    rest = ("rms", None, None, 1e-6, None, None, torch.float32)
    halves = [_cpu("norm_modulate", part, *rest) for part in x.split(2250, dim=1)]
    assert torch.equal(_cpu("norm_modulate", x, *rest), torch.cat(halves, dim=1))
    assert torch.equal(
        _cpu("activate", x, "silu"), torch.cat([_cpu("activate", p, "silu") for p in x.split(900, dim=1)], 1)
    )
    doubled = torch.cat([x, x.flip(1)], dim=2)
    assert torch.equal(
        _cpu("geglu", doubled, "geglu"), torch.cat([_cpu("geglu", p, "geglu") for p in doubled.split(900, 1)], 1)
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(_cpu("copy", x, dtype), x.to(dtype))
        assert torch.equal(_cpu("copy", x.transpose(1, 2), dtype), x.transpose(1, 2).to(dtype))
    image = x.view(1, 75, 60, 1024)
    rest = (32, None, None, 1e-6, "silu", None, None, None, torch.float32)
    wanted = OPS["group_norm"].reference(image, None, *rest)
    torch.testing.assert_close(_cpu("group_norm", image, None, *rest), wanted, rtol=2e-6, atol=2e-6)
    first = image[..., :1024].permute(0, 3, 1, 2).contiguous()
    got = _cpu("group_norm_nchw", first, *rest).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


def test_two_inputs_are_one_concatenated():
    a, b = _normal(2, 17, 16, 70), _normal(2, 16, 17, 26).transpose(1, 2).contiguous()
    rest = (
        6,
        _normal(96),
        None,
        1e-6,
        "none",
        None,
        None,
        None,
        torch.float32,
    )  # the fifth group has channels of both
    both = _cpu("group_norm", torch.cat([a, b], dim=3), None, *rest)
    torch.testing.assert_close(_cpu("group_norm", a, b, *rest), both, rtol=1e-6, atol=1e-6)


def test_programs_repeat_these_ops():
    def block(x):
        rows = OPS["copy"](x.permute(0, 2, 3, 1), torch.float32)
        y = OPS["group_norm"](rows, None, 4, None, None, 1e-6, "silu", None, None, None, torch.float32)
        y = OPS["resample"](y, "average2x").flatten(1, 2)
        return OPS["geglu"](OPS["norm_modulate"](y, "rms", None, None, 1e-6, None, None, torch.float32), "geglu")

    program = Program(block, (torch.zeros(2, 16, 8, 8),))
    for seed in range(3):
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(program(x), block(x))


@pytest.mark.parametrize(
    "name, args, message",
    (
        ("norm_modulate", (_normal(2, 3), "layer", None, None, 0.0, None, None, torch.float32), r"x must be \[B, N, C\]"),
        ("norm_modulate", (_normal(1, 2, 3), "l2", None, None, 0.0, None, None, torch.float32), "kind must be one of layer, rms"),
        ("norm_modulate", (_normal(1, 2, 3), "rms", _normal(4), None, 0.0, None, None, torch.float32), r"weight must be a float \[3\]"),
        ("group_norm", (_normal(1, 2, 2, 6), None, 4, None, None, 0.0, "none", None, None, None, torch.float32), "groups must divide the 6"),
        ("group_norm", (_normal(1, 2, 2, 6), None, 3, None, None, 0.0, "none", None, None, None, torch.int8), "out_scale must be one float32"),
        ("geglu", (_normal(2, 3), "geglu"), r"x must be \[..., 2 C\]"),
        ("activate", (_normal(2, 3), "relu"), "kind must be one of gelu"),
        ("resample", (_normal(2, 3), "nearest2x"), r"x must be \[B, H, W, C\]"),
        ("copy", (_normal(2, 3), torch.int8), "out_dtype must be float32"),
        ("quantize_rows", (torch.tensor(1.0),), r"x must be \[..., K\]"),
        ("qk_norm_rope", (_normal(1, 2, 2, 5), None, None, _normal(2, 5), _normal(2, 5), True, torch.float32), "D must be even"),
    ),
)  # fmt: skip
def test_bad_arguments_are_errors_that_say_what_to_do(name, args, message):
    with pytest.raises((ValueError, TypeError), match=f"{name}: .*{message}"):
        OPS[name](*args)
