"""Chooses configurations of the int8 attention kernels and launches them."""

import torch
import triton

from fastdiff.kernels.attention import LOG2E
from fastdiff.kernels.attention_int8 import attention_codes_kernel, attention_int8_kernel, attention_means_kernel
from fastdiff.kernels.attention_launch import Tile, family, mask_arguments, split
from fastdiff.kernels.rounding import INTERPRETED

PIECES = 16  # of the keys, whose sums are made side by side
MEANS_ROWS = 32
E4M3_KEYS = 2048
MEANS_OPTIONS, CODES_OPTIONS = {"num_warps": 4}, {"num_warps": 8}
# as in attention_launch.py. On sm_90 three blocks of 4 warps hide each other's latency (options_of)
TILES: dict[int, dict[int, Tile]] = {
    80: {128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    90: {256: Tile(64, 128, 4, 2, True)},
    120: {128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
}
INTERPRETED_TILE = Tile(16, 32, 4, 1)


def options_of(arch: int, head_dim: int, tile: Tile) -> dict[str, int]:
    return {**tile.options, **({"maxnreg": 168} if arch == 90 and head_dim <= 128 else {})}


def tile_of(arch: int, head_dim: int) -> Tile:
    return next(tile for most, tile in TILES[arch].items() if head_dim <= most)


def widths(head_dim: int) -> tuple[int, int]:
    """HEAD and TAIL, from 32 on: the least that a product of int8 adds up."""
    head, tail = split(head_dim)
    return max(head, 32), tail and max(tail, 32)


def value_type(capability: tuple[int, int], dtype: torch.dtype, keys: int) -> torch.dtype:
    """What weights and values are multiplied in. The roundings of e4m3, 3 %, need many keys to average out."""
    if capability >= (8, 9) and keys >= E4M3_KEYS:
        return torch.float8_e4m3fn
    return torch.bfloat16 if dtype == torch.float32 else dtype


def attention_int8_triton(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    scale: float,
    values_as: torch.dtype | None = None,
    tile: Tile | None = None,
) -> None:
    """Fills contiguous out [B, N, H, D] and lse [B, H, N]; three launches. values_as and tile replace the tables'."""
    (B, N, H, D), (M, heads) = q.shape, k.shape[1:3]
    if out.numel() == 0:
        return
    capability = (0, 0) if INTERPRETED.value else torch.cuda.get_device_capability(q.device)
    arch = 0 if INTERPRETED.value else family(capability)
    tile = tile or (tile_of(arch, D) if arch else INTERPRETED_TILE)
    values_as = values_as or value_type(capability, q.dtype, M)
    HEAD, TAIL = widths(D)
    blocks = max(triton.cdiv(M, tile.keys), 1)
    padded, groups, width = blocks * tile.keys, B * heads, HEAD + TAIL
    make = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=q.device)
    sums = make(4, groups, PIECES, D)
    codes, values = make(groups, padded, width, dtype=torch.int8), make(groups, width, padded, dtype=values_as)
    steps, (v_scale, v_mean, k_mean) = make(groups, blocks), make(3, groups, width)
    strides = (*k.stride()[:3], *v.stride()[:3])
    piece = triton.cdiv(triton.cdiv(M, PIECES), MEANS_ROWS) * MEANS_ROWS
    constants = {"D": D, "PIECES": PIECES}
    attention_means_kernel[(groups * PIECES,)](
        *(k, v, key_lengths, sums, M, heads, piece, *strides),
        **constants,
        WIDTH=triton.next_power_of_2(D),
        ROWS=MEANS_ROWS,
        **MEANS_OPTIONS,
    )
    attention_codes_kernel[(groups * blocks,)](
        *(k, v, key_lengths, sums, codes, steps, values, v_scale, v_mean, k_mean, M, heads, blocks, padded, *strides),
        **constants,
        WIDTH=width,
        PADDED_WIDTH=triton.next_power_of_2(width),
        BLOCK_N=tile.keys,
        **CODES_OPTIONS,
    )
    operands = [codes, None, values, None]
    if tile.tma:
        operands = _descriptors(codes, values, tile.keys, HEAD, TAIL)
    mask, mask_steps, kind = mask_arguments(mask)
    tiles = triton.cdiv(N, tile.queries)
    attention_int8_kernel[(tiles * B * H,)](
        *(q, *operands[:2], steps, *operands[2:], v_scale, v_mean, k_mean, mask, key_lengths, out, lse),
        *(N, M, H, H // heads, tiles, blocks, padded, *q.stride()[:3], *mask_steps, scale * LOG2E.value),
        D=D,
        HEAD=HEAD,
        TAIL=TAIL,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        MASK=kind.value,
        POSITIVE=scale > 0 and mask is None,
        EVEN=key_lengths is None and M % tile.keys == 0,
        TMA=tile.tma,
        SPECIALIZE=False,
        **options_of(arch, D, tile),
    )


def _descriptors(codes: torch.Tensor, values: torch.Tensor, keys: int, head: int, tail: int) -> list:
    from triton.tools.tensor_descriptor import TensorDescriptor

    k = [TensorDescriptor.from_tensor(codes, [1, keys, w]) if w else None for w in (head, tail)]
    v = [TensorDescriptor.from_tensor(values, [1, w, keys]) if w else None for w in (head, tail)]
    return k + v
