"""`activate` and `geglu` in Triton: contracts in `fastdiff/ops/activate.py` and `fastdiff/ops/geglu.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast

BLOCK = 1024  # elements of one program: 16 bytes of bfloat16 a thread and operand
OPTIONS = {"num_warps": 4}


@triton.jit
def activation(x, KIND: tl.constexpr):
    """x and the result float32."""
    if KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 1 + tanh(u) = 2 / (1 + exp(-2 u)): no tanh, which only libdevice has
        y = x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.0713548162726009 * x * x)))
    else:
        y = x / (1.0 + tl.exp(-x))
    return y


@triton.jit(do_not_specialize=["blocks"])
def activate_kernel(x_ptr, out_ptr, n, blocks, x_stride, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block). GATED: the n gates of a row follow its n values."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    offsets = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = x_ptr + row * x_stride + offsets
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = value * activation(tl.load(x + n, mask=inside, other=0.0).to(tl.float32), KIND)
    else:
        y = activation(value, KIND)
    tl.store(out_ptr + row * n + offsets, cast(y, out_ptr.dtype.element_ty), mask=inside)


def activate_triton(out: torch.Tensor, x: torch.Tensor, kind: str, gated: bool, x_stride: int) -> None:
    """Fills contiguous out [..., n]; rows of x are x_stride elements apart. Contiguous tensors are one row."""
    if out.numel() == 0:
        return
    n = out.shape[-1] if gated or not x.is_contiguous() else out.numel()
    blocks = triton.cdiv(n, BLOCK)
    grid = (out.numel() // n * blocks,)
    activate_kernel[grid](x, out, n, blocks, x_stride, KIND=kind, GATED=gated, BLOCK=BLOCK, **OPTIONS)
