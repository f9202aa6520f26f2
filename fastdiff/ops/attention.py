"""Attention in three named precisions, on strided views, with masks and lengths."""

import functools
import math

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.registry import op

PRECISIONS = {"f32": 0, "bf16": 1, "int8": 2}
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_MASK, _BOOL_MASK = -1, -2  # as in csrc/cpu/attention.h
_MAX_DIM = 1024


def _check(q, k, v, mask, key_lengths, scale, precision):
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        raise ValueError(f"attention: q must be [B, N, H, D], k and v [B, M, Hkv, D], got {shapes}")
    if q.shape[2] % max(k.shape[2], 1):
        raise ValueError(f"attention: H must be a multiple of Hkv, got {q.shape[2]} and {k.shape[2]}")
    if q.dtype not in _TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"attention: q, k and v must be of one float type, got {q.dtype}, {k.dtype}, {v.dtype}")
    if precision not in PRECISIONS:
        raise ValueError(f"attention: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if mask is not None:
        _check_mask(q, k, mask)
    if key_lengths is not None and (key_lengths.shape != q.shape[:1] or key_lengths.dtype != torch.int32):
        raise ValueError(
            f"attention: key_lengths must be [B] int32, got {list(key_lengths.shape)} {key_lengths.dtype}"
        )
    for x in (k, v, mask, key_lengths):
        if x is not None and x.device != q.device:
            raise ValueError(f"attention: all tensors must be on {q.device}, got one on {x.device}")


def _check_mask(q, k, mask) -> None:
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask.dim() != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True)):
        raise ValueError(f"attention: mask must be broadcastable to {list(full)}, got {list(mask.shape)}")
    if mask.dtype not in (torch.bool, *_TYPES):
        raise TypeError(f"attention: mask must be bool or float, got {mask.dtype}")


def _rounded(q, k, v, precision: str):
    """What the products of `precision` see of float32 operands, and what is added to the result; float64 stays as it is."""
    if precision == "f32" or q.dtype == torch.float64 or not k.shape[1]:
        return q, k, v, torch.zeros_like(v[:, :1])
    if precision == "bf16":
        return *(x.bfloat16().float() for x in (q, k, v)), torch.zeros_like(v[:, :1])
    k_mean, v_mean = k.mean(1, keepdim=True), v.mean(1, keepdim=True)
    return _coded(q, -1), k_mean + _coded(k - k_mean, -1), _coded(v - v_mean, 1), v_mean


def _coded(x, dim: int):
    step = x.abs().amax(dim, keepdim=True) / 127
    return torch.where(step == 0, 0, (x / step).round() * step)


def _weights(scores, precision: str):
    """exp(scores) of scores up to 0, as the products of `precision` see them, and their sum."""
    weights = scores.exp()
    if scores.dtype == torch.float32 and precision == "bf16":
        weights = weights.bfloat16().float()
    total = weights.sum(-1, keepdim=True)
    if scores.dtype == torch.float32 and precision == "int8":
        weights = (weights * 255).round() / 255
    return weights, total


def _keep(x, kept):
    """x with the mean of the kept tokens in the place of the others."""
    kept = kept[:, :, None, None]
    mean = torch.where(kept, x, 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return torch.where(kept, x, mean)


def _reference(q, k, v, mask, key_lengths, scale, precision):
    dtype, (B, N, H, _), M = q.dtype, q.shape, k.shape[1]
    q, k, v = (x if dtype == torch.float64 else x.float() for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1, 1)
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask.to(q.dtype)
    if key_lengths is not None:
        kept = torch.arange(M, device=q.device) < key_lengths[:, None]  # [B, M]
        bias = bias.masked_fill(~kept[:, None, None], -math.inf)
        k, v = _keep(k, kept), _keep(v, kept)
    q, *parts = _rounded(q, k, v, precision)
    k, v, center = (x.repeat_interleave(H // max(x.shape[2], 1), 2) for x in parts)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale + bias
    top = scores.amax(-1, keepdim=True) if M else scores.new_full((B, H, N, 1), -math.inf)
    top = torch.where(top == -math.inf, 0, top)
    weights, total = _weights(scores - top, precision)
    share = total.permute(0, 2, 1, 3)  # [B, N, H, 1]
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v) / torch.where(share == 0, 1, share)
    if M:
        out = out + torch.where(share == 0, 0, center)
    return out.to(dtype).contiguous(), (top + total.log()).squeeze(-1)


@op(check=_check)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    scale: float,
    precision: str,
) -> torch.Tensor:
    """Computes softmax(q k^T * scale + mask) v per head.

    q            [B, N, H, D] float32, bfloat16 or float16; any strides, the last dimension contiguous
    k, v         [B, M, Hkv, D] like q; H is a multiple of Hkv, and H / Hkv heads of q share one of k and v
    mask         [B|1, H|1, N|1, M|1] or None: bool, True where a key counts, or a float that is added
    key_lengths  [B] int32 or None: keys from there on do not exist, whatever their memory holds
    scale        usually D^-0.5
    precision    "f32": float32 throughout
                 "bf16": q, k, v and the weights exp(score - maximum) are rounded to bfloat16
                 "int8": codes of q per token, of k minus its mean over the tokens per token, of v minus its mean per
                 channel, and of the weights in steps of 1/255; sums of products of codes are exact. Signal to noise of
                 normal logits of deviation 1 and 2: 35 and 29 dB (4096 keys); more where keys are fewer
    out          [B, N, H, D], dtype of q

    Sums are float32 whatever the precision. A query without keys gives 0. NaN and infinite scores give NaN as in torch; in
    "int8" an infinite value gives NaN in its channel. A row's bits depend on the row, its keys and its values only.
    """
    return _reference(q, k, v, mask, key_lengths, scale, precision)[0]


@op(check=_check)
def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    scale: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and log(sum(exp(scores))), with which results over parts of the keys are merged.

    Arguments and out as for attention.

    lse  [B, H, N] float32; -inf for a query without keys
    """
    out, lse = _reference(q, k, v, mask, key_lengths, scale, precision)
    return out, lse.float()


def _refuse(q, k, v, mask, key_lengths, scale, precision) -> str | None:
    if q.dtype == torch.float64 or (mask is not None and mask.dtype == torch.float64):
        return "has no float64"
    if q.shape[3] > _MAX_DIM:
        return f"takes head dimensions up to {_MAX_DIM}, got {q.shape[3]}"
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return "needs a contiguous head dimension; make q, k and v contiguous"
    if key_lengths is not None and not key_lengths.is_contiguous():
        return "needs contiguous key_lengths"
    return None


def _run(out, lse, q, k, v, mask, key_lengths, scale, precision) -> None:
    (B, N, H, D), (_, M, heads, _) = q.shape, k.shape
    masked = 0, _NO_MASK, (0, 0, 0, 0)
    if mask is not None:
        code = _BOOL_MASK if mask.dtype == torch.bool else native.TYPE_CODES[mask.dtype]
        steps = tuple(0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))
        masked = mask.data_ptr(), code, steps
    lengths = 0 if key_lengths is None else key_lengths.data_ptr()
    native.cpu().attention(
        *(out.data_ptr(), lse, native.TYPE_CODES[q.dtype]),
        *(q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride()),
        *((B, N, M, H, heads, D), *masked, lengths, scale, PRECISIONS[precision]),
    )


@attention.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(q, k, v, mask, key_lengths, scale, precision):
    out = memory.empty(q.shape, q.dtype)
    _run(out, 0, q, k, v, mask, key_lengths, scale, precision)
    return out


@attention_lse.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(q, k, v, mask, key_lengths, scale, precision):
    out = memory.empty(q.shape, q.dtype)
    lse = memory.empty((q.shape[0], q.shape[2], q.shape[1]), torch.float32)
    _run(out, lse.data_ptr(), q, k, v, mask, key_lengths, scale, precision)
    return out, lse


def library_backend(capability: tuple[int, int], cudnn: int, q, k, v, mask, key_lengths, precision: str) -> str | None:
    """The kernel of torch that is faster than ours on a GPU: "cudnn", "flash", "any" or None.

    On sm_90 and sm_100 cuDNN is ahead at head dimensions 64 and 128, elsewhere FlashAttention-2 is. Not with few keys, nor
    with dimensions that they pad (40, 72, 80, 160). cuDNN 9.13 to 9.15 reads out of bounds in CUDA graphs.
    """
    exact = precision == "f32" and q.dtype == torch.float32
    if mask is not None or key_lengths is not None or not (q.numel() and k.numel()):
        return None
    if exact:
        return "any" if q.shape[3] > 64 else None
    half = q.dtype in (torch.bfloat16, torch.float16) and precision == "bf16"
    if not half or q.shape[3] not in (64, 128) or k.shape[1] <= 128 or q.shape[2] != k.shape[2]:
        return None
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return None
    if capability[0] in (9, 10):
        return "cudnn" if cudnn >= 90100 and not 91300 <= cudnn < 91600 else None
    return "flash" if capability[0] in (8, 12) else None


@functools.cache
def _machine(device: torch.device) -> tuple[tuple[int, int], int]:
    return torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0


def _library(q, k, v, mask, key_lengths, precision) -> str | None:
    return library_backend(*_machine(q.device), q, k, v, mask, key_lengths, precision)


def _refuse_sdpa(q, k, v, mask, key_lengths, scale, precision) -> str | None:
    chosen = _library(q, k, v, mask, key_lengths, precision)
    return (
        None if chosen else "the Triton kernel is preferred here, or torch's kernels lack this precision, mask or size"
    )


@attention.variant("sdpa", devices=("cuda",), refuse=_refuse_sdpa)
def _(q, k, v, mask, key_lengths, scale, precision):
    # called by their own names: choosing among them costs about 10 us a call
    kernels = torch.ops.aten
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    chosen = _library(q, k, v, mask, key_lengths, precision)
    if chosen == "cudnn":
        out = kernels._scaled_dot_product_cudnn_attention(*turned, None, False, scale=scale)[0]
    elif chosen == "flash":
        out = kernels._scaled_dot_product_flash_attention(*turned, scale=scale)[0]
    else:
        grouped = q.shape[2] != k.shape[2]
        out = torch.nn.functional.scaled_dot_product_attention(*turned, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def _refuse_triton(q, k, v, mask, key_lengths, scale, precision) -> str | None:
    from fastdiff.kernels.attention_launch import MAX_EXACT_HEAD_DIM, MAX_HEAD_DIM
    from fastdiff.kernels.rounding import INTERPRETED

    most = MAX_EXACT_HEAD_DIM if precision == "f32" and not INTERPRETED.value else MAX_HEAD_DIM
    if q.shape[3] > most:
        return f"takes head dimensions up to {most} in {precision}, got {q.shape[3]}"
    return _refuse(q, k, v, mask, key_lengths, scale, precision)


@attention.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(q, k, v, mask, key_lengths, scale, precision):
    from fastdiff.kernels.attention_launch import attention_triton

    out = memory.empty(q.shape, q.dtype, q.device)
    attention_triton(out, None, q, k, v, mask, key_lengths, scale, precision)
    return out


@attention_lse.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(q, k, v, mask, key_lengths, scale, precision):
    from fastdiff.kernels.attention_launch import attention_triton

    out = memory.empty(q.shape, q.dtype, q.device)
    lse = memory.empty((q.shape[0], q.shape[2], q.shape[1]), torch.float32, q.device)
    attention_triton(out, lse, q, k, v, mask, key_lengths, scale, precision)
    return out, lse


def _normal(generator, *shape):
    return torch.randn(shape, generator=generator)


def _lengths_and_masks(generator, B, N, M, H):
    """One of each kind of mask, with rows that have no key."""
    none = torch.zeros(B, 1, 1, M).masked_fill(torch.rand(B, 1, 1, M, generator=generator) < 0.3, -math.inf)
    causal = torch.ones(1, 1, N, M, dtype=torch.bool).tril(-1)
    yield none, None
    yield causal, None
    yield _normal(generator, 1, H, N, M).bfloat16(), torch.arange(B, dtype=torch.int32)
    yield _normal(generator, B, 1, N, 1), torch.full((B,), M + 3, dtype=torch.int32)


def _samples(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: _normal(generator, *shape)
    on = lambda *tensors: tuple(t if t is None else t.to(device) for t in tensors)
    for precision in PRECISIONS:
        for B, N, M, H, heads, D in (
            *(
                (1, 1, 1, 1, 1, 1),
                (2, 5, 7, 2, 2, 8),
                (1, 33, 77, 4, 2, 33),
                (2, 16, 131, 1, 1, 40),
                (1, 49, 257, 3, 1, 72),
            ),
            *(
                (1, 17, 128, 2, 1, 160),
                (1, 3, 0, 2, 2, 16),
                (0, 3, 4, 2, 2, 16),
                (2, 0, 4, 2, 2, 16),
                (1, 2, 300, 1, 1, 512),
            ),
        ):
            q, k, v = on(normal(B, N, H, D), normal(B, M, heads, D) + 1, normal(B, M, heads, D) - 0.5)
            yield q, k, v, None, None, D**-0.5, precision
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k, v = normal(2, 19, 3, 3, 24).to(device, dtype).unbind(2)  # [B, N, H, D], slices of one buffer
            yield q, k, v, None, None, 0.2, precision
        for mask, lengths in _lengths_and_masks(generator, 2, 21, 35, 2):
            q, k, v = on(normal(2, 21, 2, 40), normal(2, 35, 2, 40), normal(2, 35, 2, 40))
            yield q, k, v, *on(mask, lengths), 40**-0.5, precision
        q, k, v = on(1e2 * normal(1, 9, 2, 32), 1e2 * normal(1, 200, 2, 32), 1e30 * normal(1, 200, 2, 32))
        yield q, k, v, None, None, 1.0, precision
        q[0, 1, 0, 3], v[0, 7, 1, 5] = math.nan, math.nan
        yield q, k, v, None, None, -0.1, precision


attention.sample(_samples)
attention_lse.sample(_samples)
