"""Per-sample inner products: what every data-dependent coefficient is made of."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.registry import op
from fastdiff.ops.strides import evenly_strided, sizes

MAX_OPERANDS = 8
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check(operands: list[torch.Tensor]) -> None:
    if not 1 <= len(operands) <= MAX_OPERANDS:
        raise ValueError(f"gram: operands must be 1 to {MAX_OPERANDS} tensors, got {len(operands)}")
    first = operands[0]
    for v in operands:
        if v.shape != first.shape or v.device != first.device or v.dim() == 0:
            raise ValueError(
                f"gram: operands must share one shape [B, ...] and device, got {[list(w.shape) for w in operands]}"
            )
        if v.dtype not in _TYPES:
            raise TypeError(f"gram: operands must be floats, got {v.dtype}")


@op(check=_check)
def gram(operands: list[torch.Tensor]) -> torch.Tensor:
    """Computes all dot products and sums of up to eight tensors, per sample.

    operands  N <= 8 x [B, ...] any float, any strides
    out       [B, N, N + 1] float64: out[b, i, j] = <v_i, v_j> for j < N, out[b, i, N] = sum(v_i)

    Products in float32 (float64 for float64 operands), partial sums in a fixed order, totals in float64.
    Empty samples give zeros.
    """
    rows = torch.stack([v.reshape(v.shape[0], v.shape[1:].numel()).double() for v in operands], dim=1)  # [B, N, E]
    return torch.cat([rows @ rows.transpose(1, 2), rows.sum(2, keepdim=True)], dim=2)


@gram.variant("cpu", devices=("cpu",), missing=native.cpu_missing)
def _(operands):
    first, n = operands[0], len(operands)
    out = memory.empty((first.shape[0], n, n + 1), torch.float64)
    even = [evenly_strided(v) for v in operands]
    native.cpu().gram(
        out.data_ptr(), [(v.data_ptr(), native.TYPE_CODES[v.dtype], stride) for v, stride in even], *sizes(first)
    )
    return out


def _partial(first: torch.Tensor, n: int, chunks: int) -> torch.Tensor:
    """Scratch for the sums of the chunks of each sample."""
    return torch.empty(first.shape[0], n * (n + 1) // 2 + n, chunks, dtype=torch.float64, device=first.device)


@gram.variant("cuda", devices=("cuda",), missing=native.cuda_missing)
def _(operands):
    first, n = operands[0], len(operands)
    out = torch.empty(first.shape[0], n, n + 1, dtype=torch.float64, device=first.device)
    batch, channels, elements = sizes(first)
    partial = _partial(first, n, native.cuda().gram_chunks(channels * elements))
    even = [evenly_strided(v) for v in operands]
    native.cuda().gram(
        out.data_ptr(),
        partial.data_ptr(),
        [(v.data_ptr(), native.TYPE_CODES[v.dtype], stride) for v, stride in even],
        [batch, channels, elements],
        *native.queue(first.device),
    )
    return out


@gram.variant("triton", devices=("cuda",), missing=native.triton_missing)
def _(operands):
    from fastdiff.kernels.gram import chunks_of, gram_triton

    first, n = operands[0], len(operands)
    out = torch.empty(first.shape[0], n, n + 1, dtype=torch.float64, device=first.device)
    batch, channels, elements = sizes(first)
    if batch:
        partial = _partial(first, n, chunks_of(channels * elements))
        even = [evenly_strided(v) for v in operands]
        gram_triton(out, partial, [v for v, _ in even], [s for _, s in even], channels * elements, channels)
    return out


@gram.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    shapes = ((1, 1), (2, 7), (3,), (1, 255), (2, 3, 5, 17), (2, 16400), (0, 3), (2, 0, 4))
    for n, shape in enumerate(shapes):
        yield ([normal(*shape).to(device) for _ in range(n + 1)],)
    for dtype in _TYPES:
        yield ([(normal(2, 4, 9, 9) + k).to(device, dtype) for k in range(3)],)
    yield ([normal(2, 4, 9, 9).to(device, dtype) for dtype in _TYPES],)
    for shape in ((2, 5, 8, 8), (1, 3, 33, 31)):
        last = normal(*shape).to(device).to(memory_format=torch.channels_last)
        yield (
            [
                last,
                normal(*shape).to(device).transpose(2, 3).contiguous().transpose(2, 3),
                normal(1, *shape[1:]).to(device).expand(shape),
            ],
        )
    yield ([1e18 * normal(2, 300).to(device), 1e-15 * normal(2, 300).to(device)],)
