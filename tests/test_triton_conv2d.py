"""Convolutions in Triton beyond the samples of their contracts: descriptors, split sums, exact integers, choices, cuDNN's part."""

import itertools
import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastdiff.kernels import conv2d_launch
from fastdiff.kernels.conv2d_codes import codes_of
from fastdiff.kernels.conv2d_launch import Call, Sizes, Tile, conv2d_triton
from fastdiff.kernels.tuned import Machine
from fastdiff.ops import backend, conv2d, conv2d_w8a8, cudnn
from fastdiff.ops.conv2d_call import convolve, output_shape
from fastdiff.ops.conv2d_samples import make_call, make_int8_call
from fastdiff.ops.conv2d_w8a8 import quantize_samples
from fastdiff.ops.packing import conv_weight_sums, pack_conv, padded_channels, unpack_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AROUND, NONE = (1, 1, 1, 1), (0, 0, 0, 0)
TMA = Tile(64, 32, 64, 4, 1, True)
# as in SHAPES, with channels that descriptors allow; 9 rows and 7 columns fill no tile
DESCRIBED = {
    "3 x 3": (2, 9, 7, 16, 0, 20, 3, 1, AROUND, 1),
    "uneven padding": (3, 5, 6, 32, 0, 33, 3, 1, (0, 1, 0, 1), 1),
    "two segments": (1, 4, 5, 48, 16, 20, 3, 1, AROUND, 1),
    "1 x 1": (2, 7, 5, 80, 32, 20, 1, 1, NONE, 1),
    "5 x 5": (1, 4, 4, 16, 0, 4, 5, 1, (2, 2, 2, 2), 1),
}
SLOW = ("5 x 5", "uneven padding", "two segments")
FEW = [pytest.param(shape, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, shape in DESCRIBED.items()]


def _run(args: tuple, tile: Tile | None = None, splits: int | None = None) -> torch.Tensor:
    """conv2d or conv2d_w8a8 in Triton with a tile and a number of splits of the test's choice."""
    if len(args) == 12:
        (x, x2, weight), scales, weight_scale, out_scale = args[:3], (None, None), None, None
        n, kernel, stride, padding, upsample, bias, emb, residual, dtype = args[3:]
    else:
        x, x_scale, x2, x2_scale, weight, weight_scale, _, *rest = args
        scales = (x_scale, x2_scale)
        n, kernel, stride, padding, upsample, bias, emb, residual, out_scale, dtype = rest
    segments = [(i, scale) for i, scale in zip((x, x2), scales, strict=True) if i is not None]
    shape = output_shape(x, n, kernel, stride, padding, upsample)
    out = torch.full(shape, -5).to(x.device, dtype)
    sizes = Sizes(*x.shape[:3], *shape[1:3], kernel, stride, padding[0], padding[2], upsample)
    padded = padded_channels(weight, [i.shape[3] for i, _ in segments], kernel)
    conv2d_triton(out, segments, weight, padded, sizes, weight_scale, bias, emb, residual, out_scale, tile, splits)
    return out


def _expect_as_exact_as_torch(op, args: tuple, got: torch.Tensor) -> None:
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    truth, plain = op.reference(*wide).double(), op.reference(*args).double()
    error = lambda y: ((y - truth).abs().max() / truth.abs().max().clamp(min=1)).item()
    assert error(got.double()) <= 2 * error(plain) + 1e-6


def _codes(*shape) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _integer_call(x: torch.Tensor, weight: torch.Tensor, padding) -> tuple:
    """A call of conv2d_w8a8 whose result is the sum itself."""
    n, c, kernel, _ = weight.shape
    packed = pack_conv(weight, (c,), "rows").to(DEVICE), torch.ones(n, device=DEVICE)
    rest = (n, kernel, 1, list(padding), 1, None, None, None, None, torch.float32)
    return x.to(DEVICE), torch.ones(1, device=DEVICE), None, None, *packed, conv_weight_sums(weight, (c,)), *rest


@pytest.mark.parametrize("shape", FEW)
def test_described_images_are_as_exact_as_torch(shape):
    dtype = torch.float16 if shape[6] == 1 else torch.bfloat16
    args = make_call(shape, dtype, dtype, 1, DEVICE, layout="rows")
    _expect_as_exact_as_torch(conv2d, args, _run(args, TMA))


@pytest.mark.slow
@pytest.mark.parametrize("shape", DESCRIBED.values(), ids=DESCRIBED)
def test_described_codes_are_as_exact_as_torch(shape):
    for out in (torch.bfloat16, torch.int8):
        args = make_int8_call(shape, torch.int8, out, True, 3, DEVICE, layout="rows")
        _expect_as_exact_as_torch(conv2d_w8a8, args, _run(args, TMA._replace(step=32)))


@pytest.mark.parametrize(
    "tile", (pytest.param(None, id="pointers", marks=pytest.mark.slow), pytest.param(TMA, id="descriptors"))
)
def test_integer_sums_are_exact_however_they_are_split(tile):
    x, weight = _codes(2, 5, 6, 48), _codes(21, 48, 3, 3)
    want = convolve(x.double(), weight.double(), 1, (1, 0, 2, 1), 1).float()  # below 2^53
    for splits in (1, 3):
        got = _run(_integer_call(x, weight, (1, 0, 2, 1)), tile, splits)
        assert torch.equal(got.cpu(), want)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_random_calls_are_as_exact_as_torch(seed):
    """Sizes, segments, tiles and splits that nobody chose: by descriptors with odd seeds, of codes with every other pair."""
    pick, tma, codes = random.Random(seed).choice, seed % 2 == 1, seed // 2 % 2 == 1
    kernel, few = pick((1, 1, 2, 3, 5)), range(3)
    stride, upsample = (1, 1) if tma else (pick((1, 2, 3)), pick((1, 2)))
    channels = (16, 32, 48) if tma else range(1, 40)
    shape = (
        pick((1, 2, 3)),
        pick(range(kernel, 9)),
        pick(range(kernel, 9)),
        pick(channels),
        pick((0, pick(channels))),
    )
    shape += (pick((1, 4, 17, 33, 70)), kernel, stride, tuple(pick(few) for _ in range(4)), upsample)
    tile = pick((TMA, Tile(32, 16, 64, 4, 1, True))) if tma else pick((None, Tile(32, 32, 64, 4, 1)))
    kind = (
        (torch.int8, pick((torch.bfloat16, torch.int8)), True)
        if codes
        else pick(((torch.bfloat16,) * 2, (torch.half,) * 2))
    )
    args = (make_int8_call if codes else make_call)(shape, *kind, seed=seed, device=DEVICE, layout="rows")
    _expect_as_exact_as_torch(conv2d_w8a8 if codes else conv2d, args, _run(args, tile, pick((1, 2, 5))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("3 x 3", "two segments"))
def test_results_of_codes_have_the_bits_of_the_reference(name):
    """And so those of the CPU's kernel: sums are exact, and what follows is one sequence of float32 operations."""
    args = make_int8_call(DESCRIBED[name], torch.int8, torch.float32, True, 5, DEVICE, layout="rows")
    want = conv2d_w8a8.reference(*args)
    for tile, splits in ((None, 1), (TMA._replace(step=32), 1), (None, 3)):
        assert torch.equal(_run(args, tile, splits), want)


@pytest.mark.slow
@pytest.mark.parametrize("codes", (False, True), ids=("floats", "codes"))
def test_split_sums_are_as_exact_as_torch(codes):
    for tile, shape in itertools.product((None, TMA), (DESCRIBED["two segments"], DESCRIBED["1 x 1"])):
        args = make_call(shape, torch.bfloat16, torch.bfloat16, 1, DEVICE, layout="rows")
        if codes:
            args = make_int8_call(shape, torch.int8, torch.int8, True, 1, DEVICE, layout="rows")
        _expect_as_exact_as_torch(conv2d_w8a8 if codes else conv2d, args, _run(args, tile, 4))


@pytest.mark.slow
def test_nothing_but_what_a_pixel_sees_reaches_it():
    """NaN in one pixel, and in the padding of what no channel is, changes the pixels around it only."""
    args = list(
        make_call((2, 6, 5, 16, 0, 20, 3, 1, AROUND, 1), torch.float16, torch.float16, 3, DEVICE, layout="rows")
    )
    args[0][1, 3, 1, 2] = float("nan")
    want = torch.zeros(2, 6, 5, 20, dtype=torch.bool)
    want[1, 2:5, 0:3] = True
    for tile in (None, TMA):
        assert torch.equal(_run(tuple(args), tile).isnan().cpu(), want)


@pytest.mark.slow
def test_a_sample_has_the_same_bits_in_every_batch():
    args = list(
        make_call((3, 4, 5, 24, 0, 17, 3, 1, AROUND, 1), torch.bfloat16, torch.bfloat16, 5, DEVICE, layout="rows")
    )
    whole = _run(tuple(args), splits=2)
    alone = [a[1:2] if i in (0, 9, 10) and a is not None else a for i, a in enumerate(args)]
    assert torch.equal(_run(tuple(alone), splits=2)[0], whole[1])


@pytest.mark.parametrize("dtype", (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)), ids=str)
def test_codes_are_those_of_the_reference(dtype, monkeypatch):
    monkeypatch.setattr("fastdiff.kernels.conv2d_codes.BLOCK", 128)
    monkeypatch.setattr("fastdiff.kernels.conv2d_codes.MAX_PIECES", 4)
    x = torch.randn(4, 5, 9, 7).to(DEVICE, dtype)
    x[1, 4, 8, 6], x[2, 0, 0, 0], x[3] = float("inf"), float("nan"), 0
    for scale in (None, torch.tensor([0.01, 0.02, 0.03, 0.04], device=DEVICE)):
        codes, scales = codes_of(x, scale)
        want, expected = quantize_samples(x, scale)
        assert torch.equal(scales.nan_to_num(7), expected.nan_to_num(7))
        known = ~scales.isnan()
        assert torch.equal(codes[known].double(), want[known])


def _call(n: int, batch: int = 1, two: bool = False, tma: bool = False, size: int = 64) -> Call:
    sizes = Sizes(batch, size, size, size, size, 3, 1, 1, 1, 1)
    return Call(sizes, (64, 64) if two else (64,), n, torch.int8, 1, tma)


def _chosen(arch: int, *args) -> Tile:
    return conv2d_launch.tile_of(Machine(arch, 132, f"nowhere-{arch}"), _call(*args))


def test_every_call_has_a_tile():
    for arch in conv2d_launch.TILES:
        for n in (1, 4, 16, 17, 64, 100, 320, 1280):
            for tma in (False, True) if arch in conv2d_launch.TMA_TILES else (False,):
                for two in (False, True):
                    tile = _chosen(arch, n, 1, two, tma)
                    assert (tma or not tile.tma) and tile.pixels in (128, 256) and not (two and tile.pixels > 128)
    assert _chosen(90, 320, 8, False, True)[:2] == (256, 128) and _chosen(90, 320, 8, True, True)[:2] == (128, 128)
    assert _chosen(90, 4, 1, False, True).columns == _chosen(80, 4, 8).columns == 16
    assert _chosen(90, 64, 8, False, True)[:2] == (128, 64) and _chosen(80, 1280, 8, True)[1:4:2] == (64, 8)


def test_a_measured_tile_comes_first_if_it_can_serve(monkeypatch):
    machine, call = Machine(90, 132, "nowhere"), _call(640, 2, False, True, 40)
    usual, *_, narrow = conv2d_launch.tile_of(machine, call), *conv2d_launch.tiles_for(90, call)
    assert call.key == "conv2d int8 3/1*1 4096 64 640 /1 tma" and usual != narrow
    for written, expected in (
        (list(narrow), narrow),
        ([64, 64, 64, 4, 9, True, 1.0], usual),
        ("?", usual),
        (None, usual),
    ):
        monkeypatch.setattr("fastdiff.kernels.tuned.entries", lambda name, w=written: {call.key: w})
        assert conv2d_launch.tile_of.__wrapped__(machine, call) == expected
    keys = [_call(8, 1, False, False, size).key.split()[3] for size in (1, 2, 3, 5, 6, 7, 8, 9)]
    assert keys == ["1", "4", "12", "32", "48", "64", "64", "96"]


def test_steps_waste_few_channels():
    step = lambda channels, size: conv2d_launch.step_of(Tile(128, 128, 128, 8, 3), channels, size)
    assert step((640,), 1) == 128 and step((320,), 1) == 64 and step((320,), 2) == step((1280, 640), 2) == 64
    assert step((4,), 2) == 32 and conv2d_launch.step_of(Tile(64, 64, 64, 4, 2), (5,), 1) == 64


def test_boxes_leave_few_pixels_empty():
    assert conv2d_launch.box_of(128, 2, 64, 64) == conv2d_launch.box_of(128, 1, 104, 152) == (1, 8, 16)
    assert conv2d_launch.box_of(128, 2, 8, 8) == (2, 8, 8)
    assert conv2d_launch.box_of(256, 1, 1, 5000) == (1, 1, 256)
    for batch, height, width in ((1, 33, 17), (3, 5, 7), (16, 4, 4), (1, 1, 1)):
        box = conv2d_launch.box_of(128, batch, height, width)
        assert box[0] * box[1] * box[2] == 128


def test_sums_are_split_by_the_size_of_one_sample():
    def of(batch, size, channels):
        sizes = Sizes(batch, size, size, size, size, 3, 1, 1, 1, 1)
        return conv2d_launch.splits_of(132, sizes, 1280, channels)

    assert of(1, 64, 2560) == of(1, 32, 2560) == 1 and of(1, 16, 2560) == of(9, 16, 2560) == 6
    assert of(1, 8, 2560) == conv2d_launch.MAX_SPLITS and of(1, 8, 256) == 2 and of(1, 8, 8) == 1


def test_cudnn_reads_weights_where_they_lie():
    weight = torch.randn(20, 16, 3, 3).bfloat16()
    packed = pack_conv(weight, (16,), "rows")
    seen = cudnn.channels_last(packed, 20, 16, 3)
    assert seen.data_ptr() == packed.data_ptr() and seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen, weight) and torch.equal(unpack_conv(packed, 20, (16,), 3), weight)


@pytest.mark.parametrize("shape", ((2, 7, 5, 31, 0, 65, 1, 1, NONE, 1), (2, 6, 5, 16, 0, 20, 3, 2, AROUND, 1)))
def test_what_follows_cudnn_is_as_exact_as_torch(shape):
    """Here with torch's convolution of the CPU, whose sums are rounded to 16 bits as cuDNN's are."""
    args = list(make_call(shape, torch.bfloat16, torch.bfloat16, 3, DEVICE, layout="rows"))
    args[9:11] = [None, None]
    assert cudnn.refuse_conv2d(*args) is None
    _expect_as_exact_as_torch(conv2d, args, cudnn.run_conv2d(*args))


def test_cudnn_leaves_to_others_what_they_fuse():
    make = lambda shape, seed: make_call(shape, torch.bfloat16, torch.bfloat16, seed, layout="rows")
    plain = list(make((2, 4, 4, 16, 0, 16, 3, 1, AROUND, 1), 0))
    for index, value, reason in (
        (6, [0, 1, 0, 1], "uneven padding"),
        (7, 2, "upsampling"),
        (9, torch.ones(2, 16), "emb"),
        (11, torch.float32, "one 16-bit type"),
        (2, pack_conv(torch.ones(16, 16, 3, 3).bfloat16(), (16,)), "panels"),
    ):
        args = plain[:index] + [value] + plain[index + 1 :]
        assert reason in cudnn.refuse_conv2d(*args)
    assert cudnn.refuse_conv2d(*plain) is None


@pytest.mark.skipif(DEVICE == "cuda", reason="the sentences are those of a CPU")
def test_layouts_are_refused_with_a_sentence():
    for op, make in ((conv2d, make_call), (conv2d_w8a8, make_int8_call)):
        for name, layout, wanted in (("cpu", "rows", "panels"), ("triton", "panels", "rows")):
            args = make((1, 2, 2, 3, 0, 4, 1, 1, NONE, 1), layout=layout)
            with backend(name), pytest.raises(RuntimeError, match=f'layout="{wanted}"'):
                op(*args)
