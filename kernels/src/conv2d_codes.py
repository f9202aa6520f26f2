"""int8 codes of images with one scale per sample: what `conv2d_w8a8` does to float images first.

A pass of its own, because a convolution reads every pixel once per tap and tile of outputs, and asynchronous copies to shared
memory cannot convert what they copy.
"""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.quantize_static import quantize_static_triton
from fastdiff.kernels.rounding import int8_codes, magnitude_bits, step_and_inverse

BLOCK, MAX_PIECES = 4096, 128  # elements at once: four 16-byte loads of bfloat16 a thread; pieces of a sample
OPTIONS = {"num_warps": 4}


@triton.jit(do_not_specialize=["piece", "pieces"])
def sample_magnitudes_kernel(x_ptr, bits_ptr, size, piece, pieces, BLOCK: tl.constexpr):
    """Program (sample, piece): the largest magnitude of `piece` elements, as integer bits. No order changes a maximum."""
    program = tl.program_id(0)
    row = x_ptr + (program // pieces).to(tl.int64) * size
    first = (program % pieces).to(tl.int64) * piece
    last = tl.minimum(first + piece, size)
    bits = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.maximum(bits, magnitude_bits(tl.load(row + at, mask=at < last, other=0.0).to(tl.float32)))
    tl.store(bits_ptr + program, tl.max(bits, axis=0))


@triton.jit(do_not_specialize=["blocks", "pieces"])
def sample_codes_kernel(
    x_ptr, bits_ptr, codes_ptr, scale_ptr, size, blocks, pieces, BLOCK: tl.constexpr, PIECES: tl.constexpr
):
    """Program (sample, block of elements)."""
    program = tl.program_id(0)
    sample, block = (program // blocks).to(tl.int64), program % blocks
    index = tl.arange(0, PIECES)
    bits = tl.load(bits_ptr + sample * pieces + index, mask=index < pieces, other=0)
    scale, inverse = step_and_inverse(tl.max(bits, axis=0, keep_dims=True))
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + sample * size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(codes_ptr + sample * size + at, int8_codes(x, inverse), mask=at < size)
    tl.store(scale_ptr + sample + tl.arange(0, 1), scale, mask=block == 0)


def codes_of(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes like contiguous x [B, ...], their scale): the given one, or each sample's largest magnitude / 127."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if scale is not None:
        quantize_static_triton(codes, x, scale, None, x.shape[-1])
        return codes, scale
    B, size = x.shape[0], x[0].numel()
    piece = triton.cdiv(triton.cdiv(size, MAX_PIECES), BLOCK) * BLOCK
    pieces, blocks = triton.cdiv(size, piece), triton.cdiv(size, BLOCK)
    scale = torch.empty(B, dtype=torch.float32, device=x.device)
    bits = torch.empty(B * pieces, dtype=torch.int32, device=x.device)
    sample_magnitudes_kernel[(B * pieces,)](x, bits, size, piece, pieces, BLOCK=BLOCK, **OPTIONS)
    sample_codes_kernel[(B * blocks,)](
        *(x, bits, codes, scale, size, blocks, pieces), BLOCK=BLOCK, PIECES=MAX_PIECES, **OPTIONS
    )
    return codes, scale
