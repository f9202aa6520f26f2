"""Keys or values of two streams of tokens as one tensor, normed and rotated on the way: joint attention."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS
from fastdiff.ops.qk_norm_rope import MAX_HEAD_DIM, qk_norm_rope, refuse_heads, run_heads
from fastdiff.ops.registry import op


def _check(first, second, weight_first, weight_second, eps, cos, sin, out_dtype) -> None:
    for x in (first, second):
        if x.dim() != 4 or x.dtype not in FLOATS:
            raise ValueError(f"join_heads: [B, N, H, D] floats expected, got {x.dtype} {list(x.shape)}")
    B, N, H, D = first.shape
    if second.shape != (B, second.shape[1], H, D) or second.dtype != first.dtype or D > MAX_HEAD_DIM:
        raise ValueError(
            f"join_heads: streams must differ in their tokens only and D be at most {MAX_HEAD_DIM}, "
            f"got {first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        )
    for weight in (weight_first, weight_second):
        if weight is not None and (weight.shape != (D,) or weight.dtype not in FLOATS):
            raise ValueError(f"join_heads: a weight must be a float [{D}], got {weight.dtype} {list(weight.shape)}")
    if (cos is None) != (sin is None) or cos is not None and D % 2:
        raise ValueError(f"join_heads: cos and sin must both be given, for an even D, or neither; D is {D}")
    for value in (cos, sin):
        if value is not None and (value.shape != (N + second.shape[1], D) or value.dtype not in FLOATS):
            raise ValueError(
                f"join_heads: cos and sin must be floats {[N + second.shape[1], D]}, got {list(value.shape)}"
            )
    if out_dtype not in FLOATS:
        raise TypeError(f"join_heads: out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


@op(check=_check)
def join_heads(
    first: torch.Tensor,
    second: torch.Tensor,
    weight_first: torch.Tensor | None,
    weight_second: torch.Tensor | None,
    eps: float | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Puts the tokens of a stream before those of another, after the norm and the rotation of `qk_norm_rope`.

    first         [B, N, H, D] float32, bfloat16 or float16; D contiguous and at most 1024, other strides free
    second        [B, M, H, D] like first
    weight_first  [D] any float, or None; weight_second the same
    eps           added to the mean square of a head; None leaves the norm out
    cos           [N + M, D] any float, D contiguous, or None for no rotation of pairs (2 i, 2 i + 1); sin the same
    out           [B, N + M, H, D] out_dtype, contiguous

    float32 arithmetic.
    """
    parts = []
    for x, weight, rows in _streams(first, second, weight_first, weight_second):
        turned = (None, None) if cos is None else (cos[rows], sin[rows])
        parts.append(qk_norm_rope.reference(x, weight, eps, *turned, True, out_dtype))
    return torch.cat(parts, dim=1)


def _streams(
    first, second, weight_first, weight_second
) -> tuple[tuple[torch.Tensor, torch.Tensor | None, slice], ...]:
    """Both streams with their weights and their tokens in the result."""
    tokens = first.shape[1]
    return (first, weight_first, slice(0, tokens)), (second, weight_second, slice(tokens, None))


def _refuse(first, second, weight_first, weight_second, eps, cos, sin, out_dtype) -> str | None:
    return refuse_heads(first, second, weight_first, weight_second, cos, sin)


@join_heads.variant("cpu", devices=("cpu",), missing=native.cpu_missing, refuse=_refuse)
def _(first, second, weight_first, weight_second, eps, cos, sin, out_dtype):
    B, N, H, D = first.shape
    out = memory.empty((B, N + second.shape[1], H, D), out_dtype)
    for x, weight, rows in _streams(first, second, weight_first, weight_second):
        turned = (None, None) if cos is None else (cos[rows], sin[rows])
        for b in range(B):  # the rows of one sample lie together in the result
            run_heads(out[b, rows], x[b : b + 1], weight, eps, *turned, True)
    return out


@join_heads.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse)
def _(first, second, weight_first, weight_second, eps, cos, sin, out_dtype):
    from fastdiff.kernels.qk_norm_rope import qk_norm_rope_triton

    B, N, H, D = first.shape
    out = memory.empty((B, N + second.shape[1], H, D), out_dtype, first.device)
    for x, weight, rows in _streams(first, second, weight_first, weight_second):
        turned = (None, None) if cos is None else (cos[rows], sin[rows])
        qk_norm_rope_triton(out[:, rows], x, weight, eps, *turned, True)
    return out


@join_heads.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    for B, N, M, H, D in ((1, 1, 1, 1, 2), (2, 3, 5, 2, 16), (3, 7, 2, 3, 34), (1, 0, 3, 1, 8), (2, 3, 0, 2, 8)):
        angle = normal(N + M, D)
        turned = (angle.cos(), angle.sin())
        yield normal(B, N, H, D), normal(B, M, H, D), normal(D), normal(D), 1e-6, *turned, torch.float32
        yield normal(B, N, H, D), normal(B, M, H, D), None, None, None, None, None, torch.float32
    angle = normal(9, 24)
    for dtype in FLOATS:
        wide, other = (normal(2, n, 3, 4, 24).to(dtype) for n in (5, 4))
        weights = normal(24).to(dtype), None
        yield wide[:, :, 1], other[:, :, 2], *weights, 1e-5, angle.cos(), angle.sin().to(dtype), dtype
        yield wide[:, :, 1:].flatten(2, 3), other[:, :, 1:].flatten(2, 3), None, None, None, None, None, torch.float32
