"""`philox_normal` in Triton: contract in `fastdiff/ops/philox_normal.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.philox import normal_block

BLOCK = 1024
_MAX_PROGRAMS = 1 << 16
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # contraction would change the bits


@triton.jit
def philox_normal_kernel(out_ptr, seed_ptr, step_ptr, stream_ptr, n, blocks, items, BLOCK: tl.constexpr):
    for item in range(tl.program_id(0).to(tl.int64), items, tl.num_programs(0)):
        row = item // blocks
        first = (item - row * blocks) * BLOCK
        seed, step, stream = tl.load(seed_ptr + row), tl.load(step_ptr + row), tl.load(stream_ptr + row)
        offsets = first + tl.arange(0, BLOCK)
        z = normal_block(seed, step, stream, first, BLOCK)
        tl.store(out_ptr + row * n + offsets, z, mask=offsets < n)


def philox_normal_triton(out: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, stream: torch.Tensor) -> None:
    """Fills out [B, n] float32; seed int64, step and stream int32, all contiguous [B]."""
    rows, n = out.shape
    if out.numel() == 0:
        return
    blocks = triton.cdiv(n, BLOCK)
    items = rows * blocks
    grid = (min(items, _MAX_PROGRAMS),)
    philox_normal_kernel[grid](out, seed, step, stream, n, blocks, items, BLOCK=BLOCK, **OPTIONS)
