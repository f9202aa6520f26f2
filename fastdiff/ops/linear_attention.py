"""Attention without a softmax (Katharopoulos et al. 2020), with ReLU as the feature map: Sana's."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, widen
from fastdiff.ops.registry import op

MAX_DIM = 256


def _check(q, k, v, eps) -> None:
    shaped = (
        q.dim() == k.dim() == 4 and v.shape == k.shape and q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3]
    )
    if not shaped or q.shape[3] > MAX_DIM:
        shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        raise ValueError(
            f"linear_attention: q must be [B, N, H, D], k and v [B, M, H, D] with D up to {MAX_DIM}, got {shapes}"
        )
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"linear_attention: q, k, v must be of one float type, got {q.dtype}, {k.dtype}, {v.dtype}")


@op(check=_check)
def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    """Computes relu(q) (relu(k)^T v) / (relu(q) sum(relu(k)) + eps) per head.

    q     [B, N, H, D] float32, bfloat16 or float16; D contiguous and at most 256, other strides free
    k, v  [B, M, H, D] like q
    out   [B, N, H, D], dtype of q

    float32 throughout. N (M + D) work becomes (N + M) D. A query that meets no key gives 0.
    """
    wide_q, wide_k, wide_v = widen(q, k, v)
    wide_q, wide_k = wide_q.relu(), wide_k.relu()
    products = torch.einsum("bmhi,bmhj->bhij", wide_k, wide_v)
    total = torch.einsum("bnhi,bhi->bnh", wide_q, wide_k.sum(1))
    out = torch.einsum("bnhi,bhij->bnhj", wide_q, products) / (total + eps).unsqueeze(-1)
    return out.to(q.dtype).contiguous()


def _refuse(q, k, v, eps) -> str | None:
    if any(t.stride(3) != 1 and t.shape[3] > 1 for t in (q, k, v)):
        return "the elements of a head must lie one after another"
    return None


@linear_attention.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(q, k, v, eps):
    out = memory.empty(q.shape, q.dtype)
    if out.numel():
        heads = [(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v)]
        B, N, H, D = q.shape
        native.cpu().linear_attention(out.data_ptr(), native.TYPE_CODES[q.dtype], *heads, B, N, k.shape[1], H, D, eps)
    return out


@linear_attention.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(q, k, v, eps):
    from fastdiff.kernels.linear_attention import linear_attention_triton

    out = memory.empty(q.shape, q.dtype, q.device)
    linear_attention_triton(out, q, k, v, eps)
    return out


@linear_attention.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    sizes = (
        (1, 1, 1, 1, 1),
        (2, 5, 7, 3, 8),
        (1, 70, 130, 2, 32),
        (2, 9, 66, 1, 33),
        (1, 3, 5, 1, 100),
        (1, 2, 65, 2, 256),
    )
    for B, N, M, H, D in (*sizes, (0, 3, 4, 2, 8), (2, 0, 4, 2, 8), (1, 3, 0, 2, 8)):
        yield normal(B, N, H, D), normal(B, M, H, D), normal(B, M, H, D) + 1, 1e-15
    for dtype in FLOATS:
        yield *normal(2, 67, 3, 3, 40).to(dtype).unbind(2), 1e-15
    q, k, v = normal(1, 9, 2, 24).unbind(2)[0][:, :, None], normal(1, 40, 1, 24), normal(1, 40, 1, 24)
    q[0, 3] = -q[0, 3].abs()  # meets no key
    yield q, k, v, 1e-15
    q[0, 1, 0, 3], k[0, 7, 0, 5], v[0, 9, 0, 2] = torch.nan, 1e30, torch.inf
    yield q, k, v, 1e-6
    yield *(normal(2, 3, 2, 12).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3)), 1e-3
    yield *(normal(1, 3, 2, 12).transpose(2, 3) for _ in range(3)), 1e-3  # the reference serves it
