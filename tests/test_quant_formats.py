"""Number formats, ranges and settings of quantization (T numbers: section 8 of the quantization specification)."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fastdiff.quant import formats
from fastdiff.quant.activations import dynamic_codes, fake_quantize
from fastdiff.quant.config import QuantConfig, TemporalPolicy
from fastdiff.quant.measures import psnr_db, sqnr_db, ssim
from fastdiff.quant.qtensor import quantize
from fastdiff.quant.ranges import error, fit
from fastdiff.quant.schemes import LowRank, Rotate, Rounding, Scheme, Smooth, TensorSpec

INT8 = TensorSpec("int8")


def group(dtype: str, size: int, **more) -> TensorSpec:
    return TensorSpec(dtype, "group", size, **more)


def test_T6_nibbles_round_trip_every_byte():
    both = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)  # low, high
    packed = formats.pack_nibbles(both)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert packed[:, 0].tolist() == [(lo & 15) | (hi & 15) << 4 for lo, hi in both.tolist()]
    assert torch.equal(formats.unpack_nibbles(packed, 2, signed=True), both)
    unsigned = (both + 8).to(torch.uint8)
    assert torch.equal(formats.unpack_nibbles(formats.pack_nibbles(unsigned), 2, signed=False), unsigned)


def test_T6_odd_length_is_padded_with_zero():
    codes = torch.tensor([[1, -2, 7]], dtype=torch.int8)
    packed = formats.pack_nibbles(codes)
    assert packed.tolist() == [[0xE1, 0x07]]
    assert torch.equal(formats.unpack_nibbles(packed, 3, signed=True), codes)


@pytest.mark.parametrize("spec", [INT8, TensorSpec("int4"), group("int4", 32), group("int8", 16)])
def test_T8_symmetric_codes(spec):
    x = torch.randn(37, 96) * torch.logspace(-3, 3, 37)[:, None]
    x[:, 5] = 0
    q = quantize(x, spec)
    top = 127 if spec.dtype == "int8" else 7
    assert int(q.codes.abs().max()) == top and not q.codes[:, 5].any()
    scale = q.scale.repeat_interleave(q.group, 1).double()
    assert bool(((q.dequantize().double() - x.double()).abs() <= scale * (0.5 + 1e-5)).all())
    again = quantize(q.dequantize(), spec)
    assert torch.equal(again.codes, q.codes)


def test_T9_ties_round_to_even_and_non_finite_is_refused():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert quantize(x, INT8).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or Inf"):
            quantize(torch.tensor([[1.0, bad]]), INT8)
        codes, scale = dynamic_codes(torch.tensor([[1.0, bad], [1.0, -2.0]]))
        assert torch.isnan(scale[0]) and codes[1].tolist() == [64, -127]


@pytest.mark.parametrize("dtype", ["int8", "int4", "uint4", "fp8_e4m3", "nf4"])
def test_T10_rows_without_content(dtype):
    spec = TensorSpec(dtype, symmetric=dtype != "uint4")
    x = torch.stack((torch.zeros(64), torch.full((64,), 3.0), torch.full((64,), 1e-41)))
    q = quantize(x, spec)
    back = q.dequantize()
    assert bool((q.scale > 0).all()) and bool(torch.isfinite(back).all())
    assert not back[0].any() and torch.allclose(back[1], x[1], rtol=1e-6) and bool((back[2].abs() < 1e-30).all())


def test_T10_activations_without_content():
    codes, scale = dynamic_codes(torch.stack((torch.zeros(8), torch.full((8,), 1e-41), torch.full((8,), -2.0))))
    assert bool(torch.isfinite(scale).all()) and codes[2].unique().tolist() == [-127]
    assert not codes[0].any()


# section 3.1: measured on N(0, 1), less half a decibel
FLOORS = {
    "int8 row": (INT8, 41.5),
    "int4 row": (TensorSpec("int4"), 16.4),
    "int4 g128": (group("int4", 128), 18.0),
    "int4 g64": (group("int4", 64), 18.8),
    "int4 g32": (group("int4", 32), 19.7),
    "Q4_0": (group("int4", 32, range="signed"), 20.8),
    "u4 g64": (group("uint4", 64, symmetric=False), 20.3),
    "NF4 g64": (group("nf4", 64), 20.2),
    "NVFP4": (TensorSpec("nvfp4"), 19.9),
    "MXFP4": (TensorSpec("mxfp4"), 18.2),
    "e4m3 row": (TensorSpec("fp8_e4m3"), 31.0),
}


@pytest.mark.parametrize("name", FLOORS)
def test_T16_signal_to_noise_floor(name):
    spec, floor = FLOORS[name]
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 1024)))
    got = sqnr_db(x, quantize(x, spec).dequantize())
    assert floor <= got <= floor + 1.5


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_T17_smaller_groups_are_better(dtype):
    x = torch.randn(64, 512)
    made = [quantize(x, group(dtype, size)) for size in (32, 64, 128)] + [quantize(x, TensorSpec(dtype))]
    noise = [sqnr_db(x, q.dequantize()) for q in made]
    assert noise == sorted(noise, reverse=True)
    top = 7 if dtype == "int4" else 127
    for finer, coarser in zip(made, made[1:], strict=False):
        nested = finer.scale.unflatten(1, (coarser.scale.shape[1], -1)).amax(2)
        assert torch.equal(nested, coarser.scale) and bool((finer.scale * top <= x.abs().max() * 1.000001).all())


@pytest.mark.parametrize("dtype,symmetric", [("int8", True), ("int4", True), ("uint4", False), ("uint8", False)])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
def test_T18_search_is_never_worse_than_min_max(dtype, symmetric, p):
    spec = TensorSpec(dtype, symmetric=symmetric, range="mse", p=p)
    plain = dataclasses.replace(spec, range="absmax")
    rows = torch.randn(40, 80) ** 3
    found, full = error(rows, *fit(rows, spec), spec), error(rows, *fit(rows, plain), spec)
    assert bool((found <= full).all())
    assert torch.equal(error(rows, *fit(rows, dataclasses.replace(spec, grid=1)), spec), full)
    if dtype.endswith("4"):
        assert float(found.sum()) < 0.98 * float(full.sum())


def test_T18_percentile_keeps_that_share():
    rows = torch.randn(4, 1000)
    scale, _ = fit(rows, TensorSpec("int8", range="percentile", p=99.0))
    outside = (rows.abs() > scale[:, None] * 127 * 1.000001).sum(1)
    assert outside.tolist() == [10] * 4


def e4m3_values() -> np.ndarray:
    """All non-negative e4m3 values from the definition: 4 exponent bits with bias 7, 3 mantissa bits, 0x7f is NaN."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest value; of two equally near ones that with the even code."""
    values = e4m3_values()
    distance = np.abs(np.minimum(np.abs(x), 448.0)[:, None] - values)
    best = distance.min(1, keepdims=True)
    even = np.where(distance == best, np.arange(127) % 2, 2)
    return np.copysign(values[even.argmin(1)], x)


def test_T19_e4m3_rounds_to_even_and_saturates():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    values = e4m3_values()
    assert np.array_equal(codes[:127], values) and np.isnan(codes[127])
    middle = (values[1:] + values[:-1]) / 2
    for x in (values, middle, middle * 1.001, middle * 0.999, -middle):
        x = x.astype(np.float32)
        assert np.array_equal(formats.to_e4m3(torch.from_numpy(x)).float().numpy(), to_e4m3(x.astype(np.float64)))
    extremes = formats.to_e4m3(torch.tensor([449.0, 1e9, -1e9, float("inf")])).float()
    assert extremes.tolist() == [448.0, 448.0, -448.0, 448.0]


def test_T20_e2m1_rounds_to_even():
    x = torch.tensor([0.0, 0.25, 0.26, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 2.6, 3.0, 3.5, 4.0, 5.0, 5.1, 9.0])
    want = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 4.0, 6.0, 6.0]
    assert formats.from_e2m1(formats.to_e2m1(x)).tolist() == want
    assert formats.from_e2m1(formats.to_e2m1(-x)).tolist() == [-v for v in want]


def test_T20_nvfp4_has_two_levels_of_scales():
    x = torch.randn(8, 64) * torch.logspace(-2, 2, 8)[:, None]
    q = quantize(x, TensorSpec("nvfp4"))
    assert float(q.scale2) == float(x.abs().max() / (6 * 448)) and q.group == 16
    amax = x.abs().unflatten(1, (-1, 16)).amax(2)
    want = to_e4m3((amax / 6 / q.scale2).flatten().double().numpy())
    assert np.array_equal(q.scale.flatten().numpy(), want)
    assert float(q.scale.max()) == 448.0


def test_T46_rows_are_quantized_independently():
    x = torch.randn(33, 50)
    codes, scale = dynamic_codes(x)
    order = torch.randperm(33)
    shuffled, scales = dynamic_codes(x[order])
    assert torch.equal(shuffled, codes[order]) and torch.equal(scales, scale[order])
    alone = [dynamic_codes(row[None]) for row in x]
    assert torch.equal(torch.cat([c for c, _ in alone]), codes)


def test_asymmetric_activations_use_the_whole_range():
    x = torch.rand(16, 64) + 0.5  # all positive
    spec = dict(granularity="token", dynamic=True)
    asymmetric = sqnr_db(x, fake_quantize(x, TensorSpec("uint8", symmetric=False, **spec)))
    symmetric = sqnr_db(x, fake_quantize(x, TensorSpec("int8", **spec)))
    assert asymmetric - symmetric == pytest.approx(6.0, abs=0.5)  # one bit more


SCHEMES = [
    Scheme(INT8, TensorSpec("int8", "token", dynamic=True), (Rotate(),)),
    Scheme(group("int4", 64), None, (Smooth(None), LowRank(16)), Rounding("gptq")),
    Scheme(
        TensorSpec("int4", range="mse"),
        TensorSpec("uint8", "tensor", symmetric=False, per_step=True),
        (),
        Rounding("adaround", beta=(18.0, 3.0)),
        8,
    ),
]


def test_T50_settings_round_trip_through_json():
    config = QuantConfig(
        SCHEMES[0],
        ((r"\.ff\.", SCHEMES[1]), ("x", None), ("y", SCHEMES[2])),
        ("conv_in",),
        TemporalPolicy("auto", SCHEMES[1]),
    )
    text = config.to_json()
    assert QuantConfig.from_json(text) == config and QuantConfig.from_json(text).to_json() == text


def test_T50_later_files_warn_or_are_refused():
    values = QuantConfig(SCHEMES[0]).to_dict()
    with pytest.warns(UserWarning, match="'sparkle' is ignored"):
        assert QuantConfig.from_dict({**values, "sparkle": 1}) == QuantConfig(SCHEMES[0])
    with pytest.raises(ValueError, match="version must be 1 to 1, got 2"):
        QuantConfig.from_dict({**values, "version": 2})
    with pytest.raises(ValueError, match="dtype must be one of"):
        QuantConfig.from_dict({**values, "default": {"weight": {"dtype": "int3"}}})
    weight = {"dtype": "int8"}
    for changes in (
        *({"overrides": wrong} for wrong in (7, [7], [["a"]], [["a", 1]])),
        *({"default": {"weight": weight | wrong}} for wrong in ({"symmetric": "yes"}, {"p": "2"}, {"grid": 1.5})),
        *({"default": {"weight": weight, "rounding": {"beta": wrong}}} for wrong in ("ab", [None], 3)),
        {"spared": "abc"},
        {"temporal": []},
        {"calibration": 1},
    ):
        with pytest.raises(ValueError):
            QuantConfig.from_dict(values | changes)


def test_first_matching_pattern_decides():
    config = QuantConfig(SCHEMES[0], (("a", None), ("ab", SCHEMES[1])), ("^spare",))
    assert (
        config.scheme_of("xab") is None and config.scheme_of("b") == SCHEMES[0] and config.scheme_of("spare.b") is None
    )


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: TensorSpec("int8", "group"), "group_size"),
        (lambda: TensorSpec("int8", symmetric=False), "asymmetric"),
        (lambda: TensorSpec("int8", range="signed"), "signed"),
        (lambda: Rotate(128), "power of 4"),
        (lambda: Scheme(TensorSpec("int8", "token")), "per channel or group"),
        (lambda: Scheme(TensorSpec("int8"), TensorSpec("int8", "channel")), "per channel"),
        (lambda: Scheme(TensorSpec("int8"), TensorSpec("int8", "tensor", dynamic=True)), "token or group"),
        (lambda: Scheme(TensorSpec("int8"), TensorSpec("nf4", "token", dynamic=True)), "cannot be in nf4"),
        (lambda: quantize(torch.zeros(2, 30), group("int4", 16)), "groups of 16"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_picture_measures_agree_with_their_definitions():
    a = torch.rand(2, 3, 16, 16) * 2 - 1
    assert bool(torch.isinf(psnr_db(a, a)).all()) and torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64))
    b = a.clone()
    b[:, :, 0, 0] = torch.where(a[:, :, 0, 0] > 0, -1.0, 1.0)
    x, y = ((v.clamp(-1, 1).double().numpy() + 1) * 127.5 for v in (a, b))
    mse = ((np.rint(x) - np.rint(y)) ** 2).mean((1, 2, 3))
    assert psnr_db(a, b).tolist() == pytest.approx((10 * np.log10(255**2 / mse)).tolist(), rel=1e-9)
    blur = lambda v: gaussian_filter(v, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]
    noisy = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    want = np.zeros((2, 3))
    for index in np.ndindex(2, 3):
        x, y = (np.rint((v[index].double().numpy() + 1) * 127.5) for v in (a, noisy))
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        want[index] = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert ssim(a, noisy).tolist() == pytest.approx(want.mean(1).tolist(), rel=1e-9)


@pytest.mark.parametrize("shape", ((256, 8), (128, 4), (100, 6), (1, 1), (130, 5)))
def test_T21_scales_of_blocks_lie_where_tensor_cores_look(shape):
    rows, columns = shape
    scales = torch.randint(0, 256, shape, dtype=torch.uint8)
    swizzled = formats.swizzle_scales(scales)
    tiles = -(-columns // 4)
    assert swizzled.numel() == -(-rows // 128) * tiles * 512
    for r in range(0, rows, 7):
        for c in range(columns):
            place = (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            assert swizzled[place] == scales[r, c]
    assert int((swizzled != 0).sum()) == int((scales != 0).sum()), "what is added is zero"
    assert torch.equal(formats.unswizzle_scales(swizzled, rows, columns), scales)
    e4m3 = torch.rand(shape).to(torch.float8_e4m3fn)
    assert torch.equal(
        formats.unswizzle_scales(formats.swizzle_scales(e4m3), rows, columns).view(torch.uint8), e4m3.view(torch.uint8)
    )
