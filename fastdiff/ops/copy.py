"""A contiguous copy of any view, with a cast: what changes layouts inside programs."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.promote import FLOATS, result_dtype
from fastdiff.ops.registry import op

MAX_DIMS = 6


def _check(x: torch.Tensor, out_dtype: torch.dtype) -> None:
    if x.dtype not in FLOATS or out_dtype not in FLOATS:
        raise TypeError(f"copy: x and out_dtype must be float32, bfloat16 or float16, got {x.dtype} and {out_dtype}")
    if x.dim() > MAX_DIMS:
        raise ValueError(f"copy: x must have at most {MAX_DIMS} dimensions, got {x.dim()}")


@op(check=_check)
def copy(x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Copies a tensor of any strides into a contiguous one.

    x    [...] float32, bfloat16 or float16, at most 6 dimensions, any strides (permuted, sliced, expanded)
    out  x.shape, out_dtype, contiguous

    Rounds to nearest even. NHWC from NCHW is `copy(x.permute(0, 2, 3, 1), dtype)`.
    """
    out = torch.empty(x.shape, dtype=result_dtype(x, out_dtype), device=x.device)
    return out.copy_(x)


@copy.variant("cpu", devices=("cpu",), missing=native.cpu_missing)
def _(x, out_dtype):
    shape = x.shape
    out = memory.empty(shape, out_dtype)
    if out.numel():
        codes = native.TYPE_CODES
        native.cpu().copy(out.data_ptr(), codes[out_dtype], x.data_ptr(), codes[x.dtype], shape, x.stride())
    return out


@copy.variant("triton", devices=("cuda",), missing=native.triton_missing)
def _(x, out_dtype):
    from fastdiff.kernels.copy import copy_triton

    out = memory.empty(x.shape, out_dtype, x.device)
    copy_triton(out, x)
    return out


@copy.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(device)
    for shape in ((1,), (), (7,), (3, 17), (2, 0, 3), (129, 33)):
        yield normal(*shape), torch.float32
    for dtype in FLOATS:
        for out_dtype in FLOATS:
            x = (3 * normal(2, 19, 5, 7)).to(dtype)
            yield x, out_dtype
            yield x.permute(0, 2, 3, 1), out_dtype
            yield x[:, ::2, 1:, ::3], out_dtype
    for shape in ((1, 1, 4, 4), (2, 4, 8, 8), (1, 16, 16, 16), (2, 33, 9, 31), (1, 70, 40, 40)):
        yield normal(*shape).permute(0, 2, 3, 1), torch.float32
        yield normal(*shape).to(memory_format=torch.channels_last), torch.bfloat16
    tokens = normal(2, 4, 8, 6).unflatten(3, (3, 2)).unflatten(2, (4, 2))  # patches of 2 x 2
    yield tokens.permute(0, 2, 4, 3, 5, 1), torch.float32
    yield tokens.permute(0, 2, 4, 1, 3, 5), torch.float16
    yield normal(5, 1).expand(5, 9), torch.bfloat16
    yield normal(3, 1, 4).expand(3, 5, 4).permute(2, 0, 1), torch.float32
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, 65519.9, 65520.0, 1e30], device=device)
    for dtype in FLOATS:
        yield special, dtype
    yield special.bfloat16(), torch.float16
