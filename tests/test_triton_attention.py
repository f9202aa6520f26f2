"""Attention in Triton beyond the samples of its contract: parts of heads, descriptors, kinds of values, choices."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastdiff.kernels import attention_int8_launch, attention_launch
from fastdiff.kernels.attention_int8_launch import E4M3_KEYS, value_type
from fastdiff.ops.attention import attention_lse, library_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = {
    "pointers": attention_launch.Tile(16, 16, 4, 1),
    "descriptors": attention_launch.Tile(16, 16, 4, 1, True),
}


def _attention_error(head_dim: int, keys: int, precision: str, run) -> tuple[list[float], list[float]]:
    """Relative distances of out and lse to float64: those of `run`, those of torch."""
    generator = torch.Generator().manual_seed(head_dim)
    make = lambda n, h: torch.randn(1, n, h, head_dim, generator=generator).to(DEVICE)
    q, k, v = make(19, 2), make(keys, 1) + 1, make(keys, 1) - 0.5
    q, k, v = (x.half() for x in (q, k, v)) if precision == "bf16" else (q, k, v)
    rest = (None, None, head_dim**-0.5, precision)
    truth = attention_lse.reference(*(x.double() for x in (q, k, v)), *rest)
    plain = attention_lse.reference(q, k, v, *rest)
    out, lse = torch.empty_like(q), torch.empty(1, 2, 19, device=DEVICE)
    run(out, lse, q, k, v)
    distance = lambda got: [((g.double() - t).norm() / t.norm()).item() for g, t in zip(got, truth, strict=True)]
    return distance((out, lse)), distance(plain)


@pytest.mark.parametrize("head_dim, keys", ((32, 48), (40, 35), (72, 16)))
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_attention_in_parts_of_heads_and_keys(head_dim, keys, tile):
    run = lambda out, lse, q, k, v: attention_launch.attention_triton(
        out, lse, q, k, v, None, None, head_dim**-0.5, "bf16", tile
    )
    got, plain = _attention_error(head_dim, keys, "bf16", run)
    assert all(g <= 2 * p + 1e-6 for g, p in zip(got, plain, strict=True)), (got, plain)


@pytest.mark.parametrize("values", (torch.bfloat16, torch.float8_e4m3fn), ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_int8_attention_with_every_kind_of_value(values, tile):
    """Roundings of e4m3, up to 1/16, average out over 77 keys to 1.2e-2, over thousands to less than 5e-3."""
    run = lambda out, lse, q, k, v: attention_int8_launch.attention_int8_triton(
        out, lse, q, k, v, None, None, 72**-0.5, values, tile._replace(keys=32)
    )
    got, plain = _attention_error(72, 77, "int8", run)
    limits = [2e-2 if values == torch.float8_e4m3fn else 2 * plain[0], 2 * plain[1]]
    assert all(g <= most for g, most in zip(got, limits, strict=True)), (got, plain)


def test_few_keys_get_wider_values():
    half, short, exact = torch.float16, torch.bfloat16, torch.float32
    assert value_type((9, 0), half, E4M3_KEYS) == value_type((8, 9), exact, 9999) == torch.float8_e4m3fn
    assert value_type((9, 0), half, 77) == half and value_type((8, 0), exact, 9999) == short


def test_smoothing_keys_is_worth_half_the_error():
    """A channel of k that is 8 for all tokens moves all scores alike; codes of k with it waste their steps."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 1, 32, generator=generator).to(DEVICE) for n in (16, 64, 64))
    k[..., 3] += 8
    truth = attention_lse.reference(4 * q.double(), k.double(), v.double(), None, None, 32**-0.5, "f32")[0]
    out = torch.empty_like(q)
    attention_int8_launch.attention_int8_triton(out, None, 4 * q, k, v, None, None, 32**-0.5)
    coarse = (k / k.abs().amax() * 127).round() * k.abs().amax() / 127
    rough = attention_lse.reference(4 * q, coarse, v, None, None, 32**-0.5, "f32")[0]
    distance = lambda got: (got.double() - truth).norm() / truth.norm()
    assert distance(out) < 0.5 * distance(rough)


def test_heads_are_split_without_much_waste():
    split = attention_launch.split
    assert [split(d) for d in (8, 16, 40, 64, 72, 80, 96, 112, 128, 160, 256)] == [
        *((16, 0), (16, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 32), (256, 0)),
    ]
    for d in range(1, attention_launch.MAX_HEAD_DIM + 1):
        assert sum(split(d)) >= d


def test_every_call_has_a_tile():
    for arch in attention_launch.TILES:
        for head_dim in range(1, attention_launch.MAX_HEAD_DIM + 1):
            for keys in (1, 77, 128, 129, 5000):
                for tma in (False, True):
                    tile = attention_launch.tile_of(arch, head_dim, keys, False, tma)
                    assert tile.keys >= min(keys, 32) and (not tile.tma or tma)
    assert [attention_launch.family(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        *(80, 120, 120, 90, 100, 120)
    ]


def test_library_serves_what_it_is_faster_at():
    def chosen(
        capability, head_dim, keys=4096, cudnn=91900, dtype=torch.bfloat16, mask=None, precision="bf16", heads=2
    ):
        q = torch.empty(1, 8, 2, head_dim, dtype=dtype, device="meta")
        k = torch.empty(1, keys, heads, head_dim, dtype=dtype, device="meta")
        return library_backend(capability, cudnn, q, k, k, mask, None, precision)

    assert chosen((9, 0), 128) == chosen((10, 0), 64) == "cudnn" and chosen((8, 0), 64) == "flash"
    assert chosen((9, 0), 72) is chosen((9, 0), 128, keys=77) is chosen((9, 0), 128, cudnn=91400) is None
    assert chosen((9, 0), 128, heads=1) is chosen((9, 0), 128, precision="int8") is None
    assert chosen((9, 0), 128, dtype=torch.float32, precision="f32") == "any"
