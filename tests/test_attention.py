"""Attention: precision of each mode, equal bits whatever runs beside a row, and the edges of masks and numbers."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastdiff.ops import attention, attention_lse, backend, native
from fastdiff.ops.attention import PRECISIONS

ROOT = Path(__file__).parents[1]
LEVELS = ("baseline", "avx2", "avx512")

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")


def _normal(seed: int, *shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _qkv(B=2, N=37, M=150, H=2, D=40, seed=0):
    return _normal(seed, B, N, H, D), _normal(seed + 1, B, M, H, D), _normal(seed + 2, B, M, H, D)


def _run(q, k, v, mask=None, key_lengths=None, scale=None, precision="f32"):
    with backend("cpu"):
        return attention(q, k, v, mask, key_lengths, q.shape[3] ** -0.5 if scale is None else scale, precision)


def _torch(q, k, v, **options):
    """torch's own, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _sqnr(got: torch.Tensor, truth: torch.Tensor) -> float:
    return 10 * math.log10(truth.square().sum() / (got.double() - truth).square().sum())


def _bits(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("D", (1, 2, 7, 33, 40, 64, 72, 128, 160, 513))
@pytest.mark.parametrize("precision, least", (("f32", 120), ("bf16", 42), ("int8", 28)))
def test_agrees_with_torch(precision, least, D):
    # least: float32 gives 125 to 140 dB, eight bits of bfloat16 44, int8 33
    q, k, v = _qkv(D=D)
    assert _sqnr(_run(q, k, v, precision=precision), _torch(q, k, v)) > least


@pytest.mark.parametrize("L, T, least", ((256, 0.5, 39), (1024, 1, 34), (1024, 2, 31), (4096, 2, 29), (4096, 4, 30)))
def test_signal_to_noise_of_int8(L, T, least):
    # logits of standard deviation T; measured: 40.6, 35.8, 32.7, 30.4 and 32.1 dB
    q, k, v = _qkv(B=1, N=64, M=L, H=1, D=64)
    assert _sqnr(_run(q, T * k, v, precision="int8"), _torch(q, T * k, v)) > least


@pytest.mark.parametrize("size", (10, 100))
def test_int8_does_not_mind_what_all_keys_or_values_share(size):
    # outlier channels, the same for every token, are what the means of keys and values take away
    q, k, v = _qkv(B=1, N=64, M=512, H=2, D=64)
    k[..., 3::16] += size
    v[..., 5::16] -= size
    truth = _torch(q, k, v)
    assert _sqnr(_run(q, k, v, precision="int8") - v.mean(1), truth - v.double().mean(1)) > 33


def test_int8_sums_are_exact():
    # one key per query decides, and codes of +-127 stand for +-1 exactly; 1.1e-4 is the error of a weight's exponential
    v = _normal(0, 1, 128, 1, 32).sign()
    v = torch.cat([v, -v], 1)  # of mean 0
    k = 64 * torch.eye(256)[None, :, None]
    v = torch.cat([v, torch.zeros(1, 256, 1, 224)], 3)
    got = _run(k, k, v, scale=0.01, precision="int8")
    torch.testing.assert_close(got, v, rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_strides_do_not_change_bits(dtype, precision):
    qkv = _normal(0, 2, 3, 70, 4, 44).to(dtype)  # [B, 3, N, H, D + 4]
    q, k, v = (x[..., 1:41].expand(2, 70, 4, 40) for x in qkv.unbind(1))
    turned = v.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    got = _run(q, k, turned, precision=precision)
    assert torch.equal(got, _run(q.contiguous(), k.contiguous(), v.contiguous(), precision=precision))
    assert _sqnr(got, _torch(q, k, v)) > (28 if precision == "int8" else 38)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_see_the_batch(precision):
    q, k, v = _qkv(B=5, N=50, M=300, H=3, D=24)
    lengths = torch.tensor([300, 17, 0, 128, 129], dtype=torch.int32)
    whole = _run(q, k, v, key_lengths=lengths, precision=precision)
    for b in range(5):
        for h in range(3):
            one = slice(b, b + 1), slice(None), slice(h, h + 1)
            n = int(lengths[b])
            alone = _run(q[one], k[one][:, :n], v[one][:, :n], precision=precision)
            assert torch.equal(whole[one], alone), (b, h)
    # nor where in the tile it lies, nor its neighbours
    some = torch.tensor([49, 3, 3, 20])
    assert torch.equal(_run(q[:, some], k, v, precision=precision), _run(q, k, v, precision=precision)[:, some])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_groups_of_heads_that_share_memory(precision):
    # 12 heads of 1 MB: more than are packed at a time
    q, k, v = _qkv(B=1, N=8, M=2048, H=12, D=64)
    whole = _run(q, k, v, precision=precision)
    for h in (0, 7, 11):
        assert torch.equal(whole[:, :, h : h + 1], _run(*(x[:, :, h : h + 1] for x in (q, k, v)), precision=precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_grouped_queries_are_repeated_keys(precision):
    q, (_, k, v) = _normal(5, 2, 33, 6, 16), _qkv(H=2, D=16)
    repeat = lambda x: x.repeat_interleave(3, 2)
    assert torch.equal(_run(q, k, v, precision=precision), _run(q, repeat(k), repeat(v), precision=precision))


@pytest.mark.parametrize("precision, tolerance", (("f32", 2e-6), ("bf16", 2e-2), ("int8", 6e-2)))
@pytest.mark.parametrize("shape", ((2, 2, 37, 150), (1, 1, 37, 150), (2, 1, 1, 150), (1, 2, 37, 1), (1, 1, 1, 1)))
def test_masks_broadcast(shape, precision, tolerance):
    q, k, v = _qkv()
    added = _normal(9, *shape)
    kept = added > -1
    for mask in (added, kept, added.half(), added.transpose(2, 3).contiguous().transpose(2, 3)):
        truth = _torch(q, k, v, attn_mask=(mask if mask.dtype == torch.bool else mask.double()).expand(2, 2, 37, 150))
        got = _run(q, k, v, mask=mask, precision=precision)
        torch.testing.assert_close(got.double(), truth.nan_to_num(0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_padding_may_hold_anything(precision):
    q, k, v = _qkv()
    lengths = torch.tensor([140, 0], dtype=torch.int32)
    want = _run(q, k, v, key_lengths=lengths, precision=precision)
    k[0, 140:], v[0, 140:], k[1], v[1] = math.nan, math.inf, math.inf, math.nan
    got = _run(q, k, v, key_lengths=lengths, precision=precision)
    assert torch.equal(got, want) and got[1].count_nonzero() == 0 and got[0].isfinite().all()


@pytest.mark.parametrize("precision, tolerance", (("f32", 1e-5), ("bf16", 2e-2), ("int8", 5e-2)))
def test_log_sum_exp_merges_parts(precision, tolerance):
    q, k, v = _qkv()
    k = k + 2  # int8 leaves the mean out, and must put it back here
    with backend("cpu"):
        parts = [
            attention_lse(q, k[:, s], v[:, s], None, None, 0.1, precision) for s in (slice(0, 60), slice(60, None))
        ]
        _, empty = attention_lse(q, k[:, :0], v[:, :0], None, None, 0.1, precision)
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * 0.1
    torch.testing.assert_close(lses.logsumexp(0).double(), scores.logsumexp(-1), rtol=0, atol=tolerance)
    merged = (outs * lses.softmax(0).transpose(2, 3)[..., None]).sum(0)
    torch.testing.assert_close(merged.double(), _torch(q, k, v, scale=0.1), rtol=0, atol=tolerance)
    assert (empty == -math.inf).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_large_logits_pick_the_largest(precision):
    k = torch.eye(300, 64)[None, :, None].repeat(1, 1, 1, 1)
    k[0, 64:] = 0
    v = _normal(1, 1, 300, 1, 64)
    got = _run(1e4 * k[:, :64], k, v, scale=1.0, precision=precision)
    torch.testing.assert_close(got, v[:, :64], rtol=0, atol={"f32": 1e-6, "bf16": 2e-2, "int8": 2e-2}[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_is_where_torch_has_it(precision):
    q, k, v = _qkv()
    q[0, 3, 1, 5], v[1, 7, 0, 2] = math.nan, math.nan
    q[1, 4, 0, 0] = math.inf
    assert torch.equal(_run(q, k, v, precision=precision).isnan(), _torch(q, k, v).isnan())
    k[1, 149, 1, 0] = math.nan
    assert torch.equal(_run(q, k, v, precision=precision).isnan(), _torch(q, k, v).isnan())
    mask = torch.zeros(1, 1, 37, 150)
    mask[0, 0, 30, 40] = math.nan
    got = _run(q, k, v, mask=mask, precision=precision).isnan()
    assert torch.equal(got, _torch(q, k, v, attn_mask=mask.double()).isnan())


_DIGEST = """
import json, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_attention as t
torch.set_num_threads(int(sys.argv[1]))
print(json.dumps(t.digest()))
"""


def digest() -> dict[str, str]:
    """What one process computes: hashes of every precision, and int8's results themselves."""
    q, k, v = _qkv(B=3, N=130, M=300, H=2, D=40)
    small = _qkv(B=1, N=49, M=49, H=4, D=32)
    return {p: _bits(_run(q, k, v, precision=p), _run(*small, precision=p)) for p in PRECISIONS}


def _digest(threads: int, isa: str) -> dict[str, str]:
    environment = {**os.environ, "FASTDIFF_CPU_ISA": isa}
    command = [sys.executable, "-c", _DIGEST.format(root=str(ROOT)), str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("isa", ("avx512", pytest.param("avx2", marks=pytest.mark.slow)))
def test_every_thread_count_gives_the_same_bits(isa):
    if LEVELS.index(isa) > (LEVELS + ("amx",)).index(native.cpu().isa_detected()):
        pytest.skip(f"this CPU does not run {isa}")
    first = _digest(1, isa)
    assert _digest(2, isa) == first and _digest(3, isa) == first


_LEVEL = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import test_attention as t
for precision, least in (("f32", 120), ("bf16", 42), ("int8", 30)):
    q, k, v = t._qkv()
    ratio = t._sqnr(t._run(q, k, v, precision=precision), t._torch(q, k, v))
    assert ratio > least, (precision, ratio)
t.test_masks_broadcast((2, 2, 37, 150), "f32", 2e-6)
t.test_nan_is_where_torch_has_it("int8")
t.test_large_logits_pick_the_largest("bf16")
t.test_padding_may_hold_anything("int8")
"""


@pytest.mark.parametrize("isa", LEVELS)
def test_every_level_is_right(isa):
    command = [sys.executable, "-c", _LEVEL.format(root=str(ROOT))]
    environment = {**os.environ, "FASTDIFF_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


_GUARD = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/native"]
from guard import Guarded
import test_attention as t
from fastdiff.ops import backend, attention_lse, memory
for n in (1, 2, 3, 7, 15, 16, 17, 33, 40, 63, 65, 77, 129):
    for side in ("begin", "end"):
        for i, precision in enumerate(t.PRECISIONS):
            guarded = Guarded(side)
            memory.empty = guarded.empty
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(n + i) % 3]
            q, k, v = t._qkv(B=1, N=n, M=n + 3, H=1, D=n)
            mask = [None, t._normal(1, 1, 1, n, n + 3), t._normal(1, 1, 1, 1, n + 3) > -1][n % 3]
            lengths = torch.tensor([n + 2], dtype=torch.int32)
            inputs = [guarded.copy(x) for x in (q.to(dtype), k.to(dtype), v.to(dtype), mask, lengths)]
            with backend("cpu"):
                out, lse = attention_lse(*inputs, 0.3, precision)
            assert out.isfinite().all() and lse.isfinite().all()
            guarded.close()
"""


@pytest.mark.parametrize("isa", ("avx512", pytest.param("avx2", marks=pytest.mark.slow), "baseline"))
def test_nothing_is_touched_past_a_buffer(isa):
    command = [sys.executable, "-c", _GUARD.format(root=str(ROOT))]
    environment = {**os.environ, "FASTDIFF_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_wrong_arguments_are_named():
    q, k, v = _qkv()
    for args, message in (
        ((q, k[:, :, :1, :8], v, None, None), r"q must be \[B, N, H, D\]"),
        ((q[:, :, :1], k, v, None, None), "H must be a multiple of Hkv"),
        ((q, k, v, torch.ones(2, 2, 37, 149), None), "mask must be broadcastable"),
        ((q, k, v, None, torch.ones(2)), "key_lengths must be"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*args, 1.0, "f32")
    with pytest.raises(TypeError, match="one float type"):
        attention(q, k.half(), v, None, None, 1.0, "f32")
    with pytest.raises(ValueError, match="precision must be one of f32, bf16, int8"):
        attention(q, k, v, None, None, 1.0, "fp8")
