"""Rotation, smoothing, low rank, GPTQ and AdaRound (T numbers: section 8 of the quantization specification)."""

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from torch.nn import functional as F

from fastdiff.quant.activations import dynamic_codes
from fastdiff.quant.adaround import LearnedRounding, learn
from fastdiff.quant.gptq import gptq
from fastdiff.quant.hadamard import block_of, regular_hadamard, rotate
from fastdiff.quant.lowrank import low_rank, split_low_rank
from fastdiff.quant.measures import sqnr_db
from fastdiff.quant.qtensor import quantize
from fastdiff.quant.ranges import fit
from fastdiff.quant.schemes import Rounding, TensorSpec
from fastdiff.quant.smoothing import fold_into_linear, fold_into_modulation, fold_into_norm, search_scale, smooth_scale

INT8, INT4 = TensorSpec("int8"), TensorSpec("int4")


@pytest.mark.parametrize("n", [4, 16, 64, 256])
def test_T24_hadamard_is_orthogonal_in_integers(n):
    H = regular_hadamard(n)
    assert set(H.flatten().tolist()) == {-1, 1}
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.int64)) and torch.equal(H, H.T)
    assert H.sum(1).tolist() == [int(n**0.5)] * n


def test_T24_rotation_keeps_products():
    x, w = torch.randn(5, 192, dtype=torch.float64), torch.randn(7, 192, dtype=torch.float64)
    assert block_of(192) == 64 and block_of(768) == 256 and block_of(768, 64) == 64 and block_of(30) == 1
    got = rotate(x, 64) @ rotate(w, 64).T
    assert float((got - x @ w.T).abs().max()) <= 1e-12 * float((x @ w.T).abs().max())
    assert torch.equal(rotate(x, 1), x)


def product_sqnr(x: torch.Tensor, w: torch.Tensor) -> float:
    codes, scale = dynamic_codes(x)
    got = (codes.double() * scale.double()[:, None]) @ quantize(w, INT8).dequantize().double().T
    return sqnr_db(x.double() @ w.double().T, got)


def test_T25_a_constant_offset_survives_the_regular_rotation():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 1024, generator=generator) + 3, torch.randn(256, 1024, generator=generator)
    sylvester = torch.from_numpy(hadamard(256)).float() / 16
    blocks = lambda v: (v.unflatten(1, (-1, 256)) @ sylvester).flatten(1)
    plain, regular = product_sqnr(x, w), product_sqnr(rotate(x, 256), rotate(w, 256))
    assert regular >= plain - 1 and regular >= product_sqnr(blocks(x), blocks(w)) + 8


def test_rotation_repairs_outlier_channels():
    x, w = torch.randn(128, 1024), torch.randn(128, 1024)
    x[:, ::128] *= 40
    assert product_sqnr(rotate(x, 256), rotate(w, 256)) >= product_sqnr(x, w) + 10


def close(got, want):
    assert bool((got - want).abs().max() <= 1e-12 * want.abs().max())


def test_T26_smoothing_folds_exactly():
    torch.set_default_dtype(torch.float64)
    try:
        x, w = torch.randn(3, 16, 8), torch.randn(12, 8)
        s = smooth_scale(x.abs().amax((0, 1)), w.abs().amax(0), 0.5).double()
        norm, before = nn.LayerNorm(8), nn.Linear(5, 8)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        want = norm(x) @ w.T
        fold_into_norm(norm, s)
        close(norm(x) @ (w * s).T, want)
        group_norm = nn.GroupNorm(2, 8)
        pixels = x.transpose(1, 2)
        want = group_norm(pixels).transpose(1, 2) @ w.T
        fold_into_norm(group_norm, s)
        close(group_norm(pixels).transpose(1, 2) @ (w * s).T, want)
        y = torch.randn(4, 5)
        want = before(y) @ w.T
        fold_into_linear(before, s)
        close(before(y) @ (w * s).T, want)
        modulation, c = nn.Linear(6, 24), torch.randn(3, 6)
        shift, scale = slice(8, 16), slice(16, 24)

        def modulated(weight):
            rows = modulation(c)[:, None]
            return (F.layer_norm(x, (8,)) * (1 + rows[..., scale]) + rows[..., shift]) @ weight.T

        others = modulation(c)[:, :8]
        want = modulated(w)
        fold_into_modulation(modulation, s, shift, scale)
        close(modulated(w * s), want)
        assert torch.equal(modulation(c)[:, :8], others)
    finally:
        torch.set_default_dtype(torch.float32)


def test_smoothing_search_finds_more_than_nothing():
    x, w = torch.randn(512, 64), torch.randn(32, 64)
    x[:, ::8] *= 40
    amax, hessian = x.abs().amax(0), x.T @ x
    s = search_scale(w, hessian, amax, INT8, TensorSpec("int8", "token", dynamic=True))
    assert product_sqnr(x / s, w * s) >= product_sqnr(x, w) + 6
    best = max(product_sqnr(x / t, w * t) for t in (smooth_scale(amax, w.abs().amax(0), a / 10) for a in range(1, 10)))
    assert product_sqnr(x / s, w * s) >= best - 1.5  # the proxy is not the error itself


def test_T27_low_rank_is_nearly_the_best():
    w = torch.randn(96, 80) @ torch.diag(torch.logspace(1, -2, 80)) @ torch.randn(80, 80)
    up, down = low_rank(w, 16)
    assert up.shape == (96, 16) and down.shape == (16, 80)
    u, s, v = torch.linalg.svd(w.double())
    left = float((w.double() - (u[:, :16] * s[:16]) @ v[:16]).square().sum())
    assert left == pytest.approx(float(s[16:].square().sum()), rel=1e-9)
    assert left <= float((w.double() - up.double() @ down.double()).square().sum()) <= 1.02 * left
    again = low_rank(w, 16)
    assert torch.equal(again[0], up) and torch.equal(again[1], down)
    small = low_rank(w[:5], 32)
    assert torch.allclose(small[0] @ small[1], w[:5], atol=1e-4)


def test_low_rank_branch_lowers_the_error_and_alternating_never_hurts():
    w = torch.randn(64, 8) @ torch.randn(8, 128) * 2 + torch.randn(64, 128)
    spec = TensorSpec("int4", "group", 64)
    errors = []
    for iters in (1, 8):
        codes, up, down = split_low_rank(w, spec, 8, iters)
        errors.append(float((w - up @ down - codes.dequantize()).square().sum()))
    assert errors[1] <= errors[0] < 0.5 * float((w - quantize(w, spec).dequantize()).square().sum())


def correlated(k: int, n: int = 512) -> torch.Tensor:
    mix = torch.randn(k, k) * torch.logspace(0, -2, k)[:, None]
    x = torch.randn(n, k) @ mix
    return x.T @ x


def hessian_error(w, q, H) -> float:
    delta = (q.dequantize() - w).double()
    return float(((delta @ H.double()) * delta).sum())


@pytest.mark.parametrize("spec", [INT4, TensorSpec("int4", "group", 16), TensorSpec("uint4", symmetric=False)])
def test_T43_gptq(spec):
    w, H = torch.randn(24, 48), correlated(48)
    diagonal = gptq(w, torch.diag(torch.rand(48) + 0.1), spec)
    nearest = quantize(w, spec)
    assert torch.equal(diagonal.codes, nearest.codes) and torch.equal(diagonal.scale, nearest.scale)
    found = gptq(w, H, spec)
    assert hessian_error(w, found, H) < 0.6 * hessian_error(w, nearest, H)
    assert torch.equal(gptq(w, 4.0 * H, spec).codes, found.codes)
    assert torch.equal(gptq(w, H, spec, block=7).codes, found.codes) or hessian_error(
        w, gptq(w, H, spec, block=7), H
    ) == pytest.approx(hessian_error(w, found, H), rel=0.05)


def test_T43_gptq_survives_dead_inputs():
    w, H = torch.randn(8, 32), correlated(32)
    H[:, 3] = H[3] = 0
    assert bool(torch.isfinite(gptq(w, H, INT4).dequantize()).all())
    with pytest.raises(ValueError, match="positive definite"):
        gptq(w, H * float("nan"), INT4)


@pytest.mark.parametrize("spec", [INT4, TensorSpec("uint4", symmetric=False), TensorSpec("int4", "group", 16)])
def test_T42_adaround_starts_at_the_weight_and_decides_up_or_down(spec):
    w = torch.randn(16, 32)
    group = spec.group_size or 32
    scale, zero = fit(w.reshape(-1, group), spec)
    learned = LearnedRounding(w, scale.view(16, -1), None if zero is None else zero.view(16, -1), spec)
    inside = quantize(w, spec).codes
    bounds = (inside > inside.min()) & (inside < inside.max())
    assert torch.allclose(learned.soft()[bounds], w[bounds], atol=1e-6)
    ratio = w / learned.scale.repeat_interleave(group, 1)
    assert torch.allclose(learned.up(), ratio - ratio.floor(), atol=1e-5)
    assert torch.equal(learned.codes(nearest=True).codes, inside)
    learned.alpha.data.normal_()
    shift = 0 if zero is None else learned.zero.float().repeat_interleave(group, 1)
    step = learned.codes().codes.float() - shift - ratio.floor()
    assert set(step[bounds].tolist()) == {0.0, 1.0}


def test_T42_adaround_learns_correlated_inputs():
    w, x = torch.randn(16, 32), torch.randn(256, 32) @ (torch.randn(32, 32) * torch.logspace(0, -2, 32)[:, None])
    scale, _ = fit(w, INT4)
    learned = LearnedRounding(w, scale[:, None], None, INT4)
    target = x @ w.T
    settings = Rounding("adaround", iters=400, lr=2e-2, batch=64, lam=0.1)
    before = w.grad
    learn([learned], lambda rows: (x[rows] @ learned.soft().T - target[rows]).square().sum(1).mean(), 256, settings)
    loss = lambda q: float((x @ q.dequantize().T - target).square().sum(1).mean())
    assert loss(learned.codes()) < 0.8 * loss(learned.codes(nearest=True)) and before is w.grad
    decided = (learned.up() - 0.5).abs() > 0.45
    assert float(decided.float().mean()) > 0.8
