"""Linear layers on packed weights: exact integers, equal bits everywhere, nothing past a buffer, and what callers see."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.ops import OPS, backend, linear, linear_w8a8, memory, native, packing
from fastdiff.ops.linear_call import quantize_rows
from fastdiff.ops.linear_w8a8 import quantized
from fastdiff.program import Program

SCRIPT = Path(__file__).parent / "native" / "linear.py"
LEVELS = ("baseline", "avx2", "avx512", "amx")
NAMES = ("linear", "linear_w8a8", "linear_w8a16", "linear_w4a16", "linear_w4a8")
NONE = (None, "none", None, None)

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


def _run(mode: str, threads: int = 1, isa: str = "") -> dict:
    environment = {**os.environ, "FASTDIFF_CPU_ISA": isa, "FASTDIFF_BACKEND": ""}
    command = [sys.executable, str(SCRIPT), mode, str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert isa in ("", out["isa"])
    return out["result"]


def _best() -> int:
    return LEVELS.index(native.cpu().isa_detected())


@pytest.fixture(scope="module")
def codes_here() -> dict:
    return _run("codes")


@pytest.mark.parametrize("isa", LEVELS[:-1])
def test_int8_products_are_exact_and_equal_on_every_instruction_set(isa, codes_here):
    if LEVELS.index(isa) > _best():
        pytest.skip(f"this CPU does not run {isa}")
    assert _run("codes", 2, isa) == codes_here


@pytest.mark.parametrize("threads", (2, 3))
def test_every_thread_count_gives_the_same_bits(threads):
    assert _run("bits", threads) == _run("bits", 1)


@pytest.mark.parametrize("isa", ("", *(pytest.param(isa, marks=pytest.mark.slow) for isa in LEVELS[:2])))
def test_nothing_is_touched_past_a_buffer(isa):
    counts = _run("guard", 2, isa)
    assert set(counts) == set(NAMES) and min(counts.values()) >= 28


def _layer(name: str, x: torch.Tensor, weight: torch.Tensor, activation: str = "none", residual=None) -> torch.Tensor:
    """A layer with bias on rows of float x; weight [N, K], K a multiple of 32."""
    from fastdiff.ops.linear_int4 import quantized_int4

    N, bias = weight.shape[0], weight[:, 0].float().contiguous()
    rest = (bias, activation, None, residual)
    if name == "linear":
        return linear(x, packing.pack(weight.to(x.dtype)), N, *rest, x.dtype)
    if name in ("linear_w8a8", "linear_w8a16"):
        packed, scale, sums = quantized(weight.float())
        if name == "linear_w8a16":
            return OPS[name](x, packed, scale, N, *rest, x.dtype)
        return OPS[name](x, None, packed, scale, sums, N, *rest, None, x.dtype)
    return OPS[name](x, *quantized_int4(weight.float(), 32), N, 32, *rest, x.dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(name, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(263, 160, generator=generator).to(dtype), torch.randn(50, 160, generator=generator)
    together = _layer(name, x, w, "gelu")
    for first, count in ((0, 1), (7, 2), (13, 3), (20, 14), (60, 29), (200, 63)):
        assert torch.equal(_layer(name, x[first : first + count], w, "gelu"), together[first : first + count])


@pytest.mark.parametrize("rows, columns", ((263, 50), (24, 64), (1, 7)))
@pytest.mark.parametrize("name", NAMES)
def test_a_spent_residual_is_written_over_in_an_arena_only(name, rows, columns):
    x, w, residual = torch.randn(rows, 160), torch.randn(columns, 160), torch.randn(rows, columns)
    before, expected = residual.clone(), _layer(name, x, w, "gelu", residual)
    with memory.use_arena(memory.Arena()):
        place = memory.empty(residual.shape, torch.float32).copy_(residual)
        with memory.spend(residual):
            assert torch.equal(_layer(name, x, w, "gelu", residual), expected) and torch.equal(residual, before)
        with memory.spend(place):
            assert _layer(name, x, w, "gelu", place[:, :]) is not place  # another tensor than the one that was spent
            assert _layer(name, x, w, "gelu", place) is place
    assert torch.equal(place, expected)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("shape", ((600, 640, 100), (5, 2304, 1152), (2, 64, 5000)))
def test_large_layers_match_float64(shape, threads):
    M, K, N = shape
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator) / math.sqrt(K)
    packed, scale, sums = quantized(w)
    codes, x_scale = quantize_rows(x, None)
    exact = codes.double() @ packing.unpack(packed, N, K).double().T * x_scale.double() * scale.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = linear_w8a8(x, None, packed, scale, sums, N, *NONE, None, torch.float32)
        plain = linear(x, packing.pack(w), N, *NONE, torch.float32)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(plain.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", packing.LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8))
def test_packing_can_be_undone(dtype, layout):
    for N, K in ((1, 1), (16, 4), (17, 5), (50, 33)):
        w = torch.randint(-127, 128, (N, K)).to(dtype)
        packed = packing.pack(w, layout)
        g = packing.packed_k(dtype)
        panels = (-(-N // 16), -(-K // g), 16, g)
        line = 16 // dtype.itemsize
        assert packed.shape == (panels if layout == "panels" else (-(-N // 16) * 16, -(-K // line) * line))
        assert packed.is_contiguous() and packing.padded_columns(packed) == -(-N // 16) * 16
        assert torch.equal(packing.unpack(packed, N, K), w)
        assert packed.count_nonzero() == w.count_nonzero()
        assert packing.holds(packed, K) and not packing.holds(packed, K + line)
    codes = torch.randint(-8, 8, (21, 40)).to(torch.int8)
    packed = packing.pack_int4(codes, layout)
    assert torch.equal(packing.unpack_int4(packed, 21, 40), codes) and packing.holds_int4(packed, 40)
    assert not packing.unpack_int4(packed, 32, 40)[21:].any()


def test_rows_hold_even_codes_in_low_halves():
    codes = torch.tensor([[-8, 7, 1, -1, 0, 0, 0, 2]], dtype=torch.int8)
    packed = packing.pack_int4(codes, "rows")
    assert packed.shape == (16, 16) and packed[0, :4].tolist() == [0x78, 0xF1, 0x00, 0x20]
    assert not packed[1:].any() and not packed[0, 4:].any()


def test_layouts_follow_the_device_and_are_told_apart():
    w = torch.randn(20, 9)
    assert packing.pack(w).dim() == 4 and packing.layout_of(torch.device("cuda")) == "rows"
    rows, panels = packing.pack(w, "rows"), packing.pack(w, "panels")
    assert packing.refuse_rows(panels) is None and "for GPUs" in packing.refuse_rows(rows)
    assert packing.refuse_panels(rows) is None and "for CPUs" in packing.refuse_panels(panels)
    with backend("cpu"), pytest.raises(RuntimeError, match='layout="panels"'):
        linear(torch.randn(3, 9), rows, 20, *NONE, torch.float32)
    with pytest.raises(ValueError, match="layout must be one of panels, rows, got 'columns'"):
        packing.pack(w, "columns")
    with pytest.raises(TypeError, match="float32, bfloat16, int8"):
        packing.pack(w.half(), "panels")


@pytest.mark.parametrize("layout", packing.LAYOUTS)
def test_pairs_lie_in_panels_of_16(layout):
    value, gate = torch.randn(20, 8), torch.randn(20, 8)
    packed = packing.pack_pairs(value, gate, layout)
    panel = 1 if layout == "panels" else 16
    assert torch.equal(packing.unpack(packed[:panel], 16, 8), value[:16])
    assert torch.equal(packing.unpack(packed[3 * panel :], 4, 8), gate[16:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.int8))
def test_convolutions_in_rows_pad_the_channels_of_each_tap(dtype):
    line = 16 // dtype.itemsize
    for channels in ((3,), (6, 17), (16, 32)):
        w = torch.randint(-127, 128, (19, sum(channels), 3, 3)).to(dtype)
        packed = packing.pack_conv(w, channels, "rows")
        padded = [-(-c // line) * line for c in channels]
        assert packed.shape == (32, 9 * sum(padded)) and packing.padded_channels(packed, channels, 3) == padded
        assert torch.equal(packing.unpack_conv(packed, 19, channels, 3), w)
        assert torch.equal(packing.unpack_conv(packed.double(), 19, channels, 3), w.double())
        tap = 9 * padded[0] + 5 * padded[-1] if len(channels) == 2 else 5 * padded[0]  # row 1, column 2
        assert torch.equal(packed[:19, tap : tap + channels[-1]], w[:, -channels[-1] :, 1, 2])
        assert packed.count_nonzero() == w.count_nonzero()
    with pytest.raises(ValueError, match="not packed from"):
        packing.unpack_conv(packed, 19, (40, 100), 3)


def test_codes_follow_the_rule():
    # a tie (0.5), the largest value, zeros, a number whose reciprocal rounds
    x = torch.tensor([[254.0, 1.0, 3.0, -254.0], [0.0, 0.0, -0.0, 0.0], [0.3, -0.1, 0.7, 1.1]])
    codes, scale = quantize_rows(x, None)
    assert codes[0].tolist() == [127, 0, 2, -127] and codes[1].count_nonzero() == 0
    assert scale[0].item() == 2.0 and scale[1].item() == 0.0
    identity = torch.eye(4, dtype=torch.int8)
    args = (packing.pack(identity), torch.ones(4), packing.weight_sums(identity), 4, *NONE, None, torch.float32)
    assert torch.equal(linear_w8a8(x, None, *args), codes * scale)
    static = linear_w8a8(torch.tensor([[2.5, -3.5, 1e9, float("nan")]]), torch.ones(1), *args)
    assert static.tolist() == [[2, -4, 127, -127]]


def test_rows_that_are_not_finite_become_nan_alone():
    x = torch.randn(4, 40)
    x[1, 3], x[2, 39] = torch.nan, -torch.inf
    packed, scale, sums = quantized(torch.randn(20, 40))
    got = linear_w8a8(x, None, packed, scale, sums, 20, *NONE, None, torch.float32)
    assert got[1:3].isnan().all() and got[[0, 3]].isfinite().all()


def _activated(activation: str, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer makes of many numbers, and float64."""
    x = torch.cat([torch.linspace(-20, 20, 100_001), torch.logspace(-38, 38, 999), -torch.logspace(-38, 38, 999)])
    one = packing.pack(torch.ones(1, 1))
    got = linear(x[:, None], one, 1, None, activation, None, None, out_dtype)[:, 0].double()
    t = x.double()
    inner = math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)
    truth = {
        "gelu": t * torch.special.erfc(-t / math.sqrt(2)) / 2,
        "gelu_tanh": t * torch.sigmoid(2 * inner),
        "silu": t * torch.sigmoid(t),
    }[activation]
    return got, truth


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "silu"))
def test_activations_are_accurate_everywhere(activation):
    got, truth = _activated(activation, torch.float32)
    assert ((got - truth).abs() / truth.abs().clamp(min=1)).max() < 2.5e-7


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh"))
def test_activations_of_bfloat16_results_are_rounded_numbers(activation):
    got, truth = _activated(activation, torch.bfloat16)
    half = 2.0 ** (torch.frexp(truth)[1] - 9)  # of the last bit
    error = (got - truth).abs() / half.clamp(min=2.0**-126)
    assert error[(truth >= 0) | (truth < -0.0041)].max() < 1.03
    assert ((got - truth).abs() - half).max() < 5e-7
    x = torch.tensor([[torch.inf], [-torch.inf], [torch.nan]])
    ends = linear(x, packing.pack(torch.ones(1, 1)), 1, None, activation, None, None, torch.bfloat16)[:, 0]
    assert ends[0] == torch.inf and -1e-18 < ends[1] <= 0 and ends[2].isnan()


def test_layers_can_be_recorded():
    x = torch.randn(2, 9, 64)
    w = [torch.randn(64, 64) / 8 for _ in range(2)]
    first, second = quantized(w[0]), packing.pack(w[1])

    def forward(x):
        y = linear_w8a8(x, None, *first, 64, None, "silu", None, None, None, torch.float32)
        return linear(y, second, 64, None, "none", None, x, torch.float32)

    program = Program(forward, (x,))
    other = torch.randn(2, 9, 64)
    assert len(program) == 2 and torch.equal(program(other), forward(other))


def test_strided_arguments_are_read_in_place():
    wide, modulation = torch.randn(2, 9, 3 * 64), torch.randn(2, 6 * 48)
    x, gate = wide[..., 64:128], modulation[:, 48:96]
    packed = packing.pack(torch.randn(48, 64))
    got = linear(x, packed, 48, None, "none", gate, wide[..., 100:148], torch.float32)
    plain = linear(x.contiguous(), packed, 48, None, "none", None, None, torch.float32)
    assert torch.equal(got, plain * gate[:, None] + wide[..., 100:148])


def test_errors_name_the_argument():
    x, packed = torch.randn(2, 3, 8), packing.pack(torch.randn(20, 8))
    call = lambda x=x, n=20, bias=None, act="none", gate=None, res=None, out=torch.float32: linear(
        x, packed, n, bias, act, gate, res, out
    )
    cases = (
        (dict(n=40), ValueError, "panels"),
        (dict(act="relu"), ValueError, "activation must be one of none, gelu"),
        (dict(bias=torch.randn(19)), ValueError, "bias must be contiguous"),
        (dict(gate=torch.randn(4, 20)), ValueError, "gate must be"),
        (dict(res=torch.randn(6, 20)), ValueError, "residual must be rows"),
        (dict(x=torch.randn(2, 3, 9)), ValueError, "packed from"),
        (dict(x=torch.randn(3, 2, 8).transpose(0, 1)), ValueError, "one stride"),
        (dict(out=torch.int8), TypeError, "out_scale"),
    )
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            call(**options)
    with backend("cpu"), pytest.raises(RuntimeError, match="float32"):
        call(x=x.double())


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_amx_code_is_right_on_emulated_tiles(tmp_path):
    root = SCRIPT.parents[2]
    features = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vnni avx512bf16"
    if _best() < LEVELS.index("avx512"):
        pytest.skip("the code around the tiles is AVX512")
    sources = [
        SCRIPT.parent / "amx.cpp",
        *(root / f"csrc/cpu/{name}.cpp" for name in ("parallel", "workspace", "dispatch")),
    ]
    flags = (
        "-std=c++17 -O1 -w -fno-strict-aliasing -ffp-contract=off -DFASTDIFF_ISA=amx -DFASTDIFF_AMX_EMULATED".split()
    )
    command = ["g++", *flags, *(f"-m{name}" for name in features.split()), f"-I{root / 'csrc'}", f"-I{SCRIPT.parent}"]
    subprocess.run([*command, *map(str, sources), "-ldl", "-lpthread", "-o", str(tmp_path / "amx")], check=True)
    done = subprocess.run([str(tmp_path / "amx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 588


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_module_has_amx_instructions():
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.cpu().__file__], capture_output=True, text=True
    )
    for name in ("tdpbusd", "tdpbf16ps", "ldtilecfg", "tilerelease"):
        assert name in listing.stdout, name
