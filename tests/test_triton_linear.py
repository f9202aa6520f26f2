"""The linear layers in Triton beyond the samples of their contracts: every path of the kernel, exact sums, choices."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastdiff.kernels import linear_launch, linear_tiles, tuned
from fastdiff.kernels.linear_expand import expand
from fastdiff.kernels.linear_tiles import FEW, TILES, Product, Tile, many_tile
from fastdiff.ops import OPS, backend, cublas, linear, linear_w8a8, packing
from fastdiff.ops.linear_call import quantize_rows
from fastdiff.ops.linear_int4 import quantized_int4
from fastdiff.ops.linear_w8a8 import quantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE = (None, "none", None, None)
PATHS = {
    "few rows": (64, Tile(32, 32, 32, 4, 1)),
    "pointers": (0, Tile(32, 128, 32, 4, 2, 4)),
    "descriptors": (0, Tile(32, 64, 32, 4, 2, 2, True)),
}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request, monkeypatch) -> Tile:
    few, tile = request.param
    monkeypatch.setattr(linear_launch, "FEW_ROWS", few)
    monkeypatch.setattr(linear_launch, "_tile", lambda *choice: tile)
    return tile


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def test_sums_of_codes_are_exact(path):
    """Random codes and the largest, several tiles each way and a tail each way."""
    x, w = _codes(40, 80), _codes(70, 80)
    x[0], w[1] = 127, -127
    ones, sums = torch.ones(70, device=DEVICE), packing.weight_sums(w).to(DEVICE)
    packed = packing.pack(w, "rows").to(DEVICE)
    with backend("triton"):
        one = torch.ones(1, device=DEVICE)
        got = linear_w8a8(x.to(DEVICE), one, packed, ones, sums, 70, *NONE, None, torch.float32)
    assert torch.equal(got.cpu(), (x.long() @ w.long().T).float())


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "linear_w4a8", "linear_w4a16")]


@pytest.mark.parametrize("name", ("linear_w8a8", *SLOW))
def test_all_that_surrounds_a_product(name, path):
    """Pairs, gates and a residual over several tiles, at the precision that torch has."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)
    x, bias, gate, residual = normal(2, 17, 64), normal(96), normal(2, 48), normal(2, 17, 48)
    weight = packing.interleave(normal(40, 64), normal(40, 64))
    N, rest = 96, (bias, "geglu", gate, residual)
    if name == "linear":
        args = (x.bfloat16(), packing.pack(weight.bfloat16(), "rows"), N, *rest, torch.float32)
    elif name == "linear_w8a8":
        args = (x, None, *quantized(weight, "rows"), N, *rest, None, torch.float32)
    else:
        args = (x.half(), *quantized_int4(weight, 32, "rows"), N, 32, *rest, torch.float32)
    op = OPS[name]
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    truth, plain = op.reference(*wide), op.reference(*args)
    with backend("triton"):
        got = op(*args)
    error = lambda y: (y.double() - truth).abs().max() / truth.abs().max()
    assert error(got) <= 2 * error(plain) + 1e-6


def test_bits_are_the_references_without_an_activation(path):
    """Rows that are not finite are NaN, and spoil no other."""
    x, w, bias, gate, residual = (torch.randn(s) for s in ((40, 80), (33, 80), (33,), (2, 33), (40, 33)))
    x[3, 5], x[33, 0] = torch.nan, torch.inf
    packed, scale, sums = quantized(w, "rows")
    args = (x, None, packed, scale, sums, 33, bias, "none", gate, residual, None, torch.float32)
    args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    with backend("triton"):
        got = linear_w8a8(*args)
    assert got.isnan().any(1).nonzero()[:, 0].tolist() == [3, 33] and got[[3, 33]].isnan().all()
    assert torch.equal(got.nan_to_num(7), linear_w8a8.reference(*args).nan_to_num(7))


@pytest.mark.parametrize("dtype", (torch.int8, torch.bfloat16), ids=str)
def test_expanded_weights_are_the_codes(dtype):
    whole, half = _codes(32, 33), torch.randint(-8, 8, (32, 96), dtype=torch.int8)
    for codes, packed in ((whole, packing.pack(whole, "rows")), (half, packing.pack_int4(half, "rows"))):
        got = expand(packed.to(DEVICE), None, 0, dtype)
        assert got.dtype == dtype and torch.equal(got[:, : codes.shape[1]].cpu().to(torch.int8), codes)
        assert not got[:, codes.shape[1] :].any()
    scale = torch.rand(20, 3).to(DEVICE)
    got = expand(packing.pack_int4(half, "rows").to(DEVICE), scale, 32, torch.bfloat16)
    want = half[:20].float().to(DEVICE) * scale.repeat_interleave(32, 1)
    assert torch.equal(got[:20], want.bfloat16()) and not got[20:].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_many_rows_of_four_bits(dtype):
    """16-bit results take rounded weights, wider ones whole codes and scaled sums of groups."""
    x, w = torch.randn(65, 64).bfloat16().to(DEVICE), torch.randn(16, 64).to(DEVICE)
    packed, scale = quantized_int4(w, 32, "rows")
    truth = x.double() @ (packing.unpack_int4(packed, 16, 64).double() * scale.double().repeat_interleave(32, 1)).T
    with backend("triton"):
        got = OPS["linear_w4a16"](x, packed, scale, 16, 32, *NONE, dtype)
    assert ((got.double() - truth).norm() / truth.norm()) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def test_blocks_divide_groups():
    block = lambda line, dtype, group: linear_launch._block(Tile(16, 64, line, 4, 3), dtype, group)
    assert [block(128, torch.int8, group) for group in (0, 32, 64, 96, 128, 192, 256)] == [
        128,
        32,
        64,
        32,
        128,
        64,
        128,
    ]
    assert [block(128, torch.bfloat16, group) for group in (0, 32, 128)] == [64, 32, 64]
    assert block(32, torch.float32, 0) == 32
    x = torch.randn(2, 24)
    reason = OPS["linear_w4a16"].explain(x, *quantized_int4(torch.randn(5, 24), 8, "rows"), 5, 8, *NONE, x.dtype)
    assert "32 k at least" in reason["triton"]


@pytest.mark.parametrize("arch", TILES)
def test_every_shape_has_a_tile(arch):
    """One that exists, and none that leaves most multiprocessors idle where a smaller one would not."""
    machine = tuned.Machine(arch, 132, "nowhere")
    choice = lambda rows, columns, *how: many_tile(machine, Product(rows, columns, 1152, torch.int8, *how))
    for rows in (65, 154, 512, 2048, 4608, 75_600):
        for columns in (16, 320, 1152, 3072, 27_648):
            for tma, plain in ((True, True), (False, True), (True, False)):
                tile = choice(rows, columns, tma, plain)
                assert tile.tma <= tma and (plain or tile.columns <= 128)
                assert not tile.tma or any(tile[:5] == known[:5] for known in TILES[arch])
    assert choice(75_600, 27_648) == TILES[arch][0] and choice(512, 1152).rows == 64
    few = [linear_tiles.few_tile(arch, rows, 27_648, 132) for rows in (1, 16, 17, 64, 65)]
    assert [t.rows for t in few] == [16, 16, 32, 64, 64] and all(t in FEW[arch] for t in few)
    assert linear_tiles.few_tile(arch, 2, 1152, 132).columns == 32


def test_measured_tiles_come_before_the_tables(monkeypatch):
    """For all rows up to the next step; a file that names what the tables do not offer chooses nothing."""
    product = Product(2048, 1280, 5120, torch.int8)
    assert product.key == product._replace(rows=1537).key != product._replace(rows=1536).key
    assert product._replace(rows=1025).key == product._replace(rows=1536).key
    other = TILES[90][3]
    for wanted, chosen in ((list(other), other), ([7, *other[1:]], None)):
        monkeypatch.setattr(tuned, "entries", lambda machine, wanted=wanted: {product.key: wanted})
        many_tile.cache_clear()
        got = many_tile(tuned.Machine(90, 132, "here"), product)
        assert got == chosen if chosen else got in TILES[90] and got != other
    many_tile.cache_clear()


def test_descriptors_want_sixteen_bytes():
    x = torch.zeros(4, 48, dtype=torch.bfloat16)
    assert linear_launch.allows_descriptor(x, 48) and linear_launch.allows_descriptor(x[:, 8:], 48)
    assert not linear_launch.allows_descriptor(x[:, 1:], 48) and not linear_launch.allows_descriptor(x, 44)
    assert not linear_launch.allows_descriptor(x[:1].expand(4, 48), 0) and not linear_launch.allows_descriptor(
        x[:0], 48
    )


def test_the_library_serves_what_only_a_bias_follows():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 7, 80, generator=generator)[..., 8:48], torch.randn(33, 40, generator=generator)
    bias = torch.randn(33, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        args = (x.to(dtype), packing.pack(w.to(dtype), "rows"), 33, bias, "none", None, None, dtype)
        assert cublas.refuse_linear(*args) is None
        truth = linear.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args[:4]), *args[4:])
        error = lambda y, t=truth: (y.double() - t).abs().max() / t.abs().max()
        assert error(cublas.run_linear(*args)) <= 2 * error(linear.reference(*args)) + 1e-6
        assert "nothing but a bias" in cublas.refuse_linear(*args[:4], "gelu", None, None, dtype)
        assert "returns the weight's dtype" in cublas.refuse_linear(*args[:-1], torch.float16)
    panels = (args[0], packing.pack(w.bfloat16(), "panels"), *args[2:])
    assert "for CPUs" in cublas.refuse_linear(*panels)


def test_static_codes_of_nan_are_the_least():
    x = torch.tensor([[2.5, -3.5, 1e9, float("nan")]], device=DEVICE)
    identity = torch.eye(4, dtype=torch.int8)
    packed, sums = packing.pack(identity, "rows").to(DEVICE), packing.weight_sums(identity).to(DEVICE)
    one = torch.ones(1, device=DEVICE)
    args = (packed, torch.ones(4, device=DEVICE), sums, 4, *NONE)
    with backend("triton"):
        assert linear_w8a8(x, one, *args, None, torch.float32).tolist() == [[2, -4, 127, -127]]
        codes, scale = (t.to(DEVICE) for t in quantize_rows(x[:, :3], None))
        spoilt = linear_w8a8(torch.cat([codes, codes[:, :1]], 1).char(), scale * torch.nan, *args, one, torch.int8)
    assert spoilt.tolist() == [[-127] * 4]


@pytest.mark.slow
def test_tiles_can_be_timed(monkeypatch):
    """The host side of the tool that tables are made with; what it times here is the interpreter."""
    from bench import gpu_linear_tiles as tool
    from bench.timing import Timing

    def timed(ready, seconds):
        return {tile: run() and Timing(len(ready) - k, 0, 0, 1) for k, (tile, run) in enumerate(ready.items())}

    monkeypatch.setattr(tool, "FLIGHT", 1.0)
    monkeypatch.setattr(tool, "interleave", timed)
    monkeypatch.setitem(TILES, 90, (Tile(32, 64, 32, 4, 2, 2),))
    many_tile.cache_clear()
    seen = list(
        tool.records(((66, 32, 64),), tuned.Machine(90, 132, "nowhere"), DEVICE, 0.01, lambda run, device: run)
    )
    assert len(seen) == 2 * len(tool.candidates(90, 70)) == 8
    assert [record["us"] for record in seen] == [0.5, 1.0, 1.5, 2.0] * 2 and seen[3]["chosen"] and seen[7]["chosen"]
    assert "(chosen)" in "".join(tool.line(record) for record in seen)
    refused = {
        "shape": (1, 2, 3),
        "type": torch.int8,
        "tile": Tile(16, 64, 128, 4, 3),
        "skipped": "out of shared memory",
    }
    assert "skipped: out of shared memory" in tool.line(refused)


def _far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows 2^30 elements apart, in memory of which only they are touched."""
    far = torch.empty_strided(rows.shape, (2**30 + 16, 1), dtype=rows.dtype, device=rows.device)
    return far.copy_(rows)


def test_offsets_beyond_two_to_the_31():
    x, w, residual = _codes(4, 48), _codes(32, 48), torch.randn(4, 32).half()
    args = (packing.pack(w, "rows"), torch.ones(32), packing.weight_sums(w), 32, *NONE)
    weights = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    weights[-1] = _far_apart(residual.to(DEVICE))
    with backend("triton"):
        one = torch.ones(1, device=DEVICE)
        got = linear_w8a8(_far_apart(x.to(DEVICE)), one, *weights, None, torch.float32)
    assert torch.equal(got.cpu(), (x.long() @ w.long().T).float() + residual)
