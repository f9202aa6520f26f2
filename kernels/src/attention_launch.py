"""Chooses configurations of the attention kernels and launches them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdiff.kernels.attention import FULL_MASK, KEY_MASK, LOG2E, NO_MASK, attention_kernel
from fastdiff.kernels.rounding import INTERPRETED

MAX_HEAD_DIM = 256
SINGLE_KEYS = 128  # up to so many keys, all are in one block
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """BLOCK_M queries and BLOCK_N keys at once, warps, stages; tma: descriptors, and warps that only load."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# per architecture, the head dimension up to which a tile serves: chosen by registers, spills and shared memory of what
# tests/aot_compile.py compiles. sm_89 and sm_120 have 99 KB of shared memory, sm_80 has 163
TILES: dict[int, dict[int, Tile]] = {
    80: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    90: {128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    100: {64: Tile(128, 64, 4, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    120: {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
}
# without a mask and lengths, where q, k and v allow descriptors; two warp groups multiply and one loads, with 4 warps only
TMA_TILES: dict[int, dict[int, Tile]] = {
    90: {128: Tile(128, 128, 4, 2, True), 160: Tile(128, 64, 4, 2, True)},
    100: {64: Tile(128, 128, 4, 2, True)},
}
EXACT_TILE, MAX_EXACT_HEAD_DIM = Tile(64, 32, 4, 2), 64  # float32: three TF32 products in one's place; more spills
INTERPRETED_TILE = Tile(16, 32, 4, 1)


def split(head_dim: int) -> tuple[int, int]:
    """HEAD and TAIL: powers of two from 16 on whose sum is at least head_dim, TAIL 0 or smaller than HEAD."""
    head = max(1 << (head_dim.bit_length() - 1), 16)
    tail = triton.next_power_of_2(max(head_dim - head, 16)) if head_dim > head else 0
    return (2 * head, 0) if tail >= head else (head, tail)


def family(capability: tuple[int, int]) -> int:
    """The architecture whose tiles serve a GPU: its own, or one with as much shared memory."""
    major, minor = capability
    if major == 8:
        return 80 if minor in (0, 7) else 120
    return {9: 90, 10: 100, 11: 100}.get(major, 120)


def tile_of(arch: int, head_dim: int, keys: int, exact: bool, tma: bool) -> Tile:
    """The tile for a call; `tma` says whether its tensors allow descriptors."""
    if keys <= SINGLE_KEYS:
        wide = 64 if keys <= 64 else SINGLE_KEYS
        return EXACT_TILE._replace(keys=wide) if exact else _single(arch, head_dim, wide)
    if exact:
        return EXACT_TILE
    tables = ([TMA_TILES.get(arch, {})] if tma else []) + [TILES[arch]]
    return next(tile for table in tables for most, tile in table.items() if head_dim <= most)


def with_mask(tile: Tile) -> Tile:
    """A mask takes registers, which 4 warps with 128 queries do not have."""
    return tile._replace(warps=8) if tile.queries == 128 else tile


def _single(arch: int, head_dim: int, keys: int) -> Tile:
    if arch in (90, 100):
        return Tile(128, keys, 8, 1)
    return Tile(128, keys, 8, 1) if head_dim <= 64 else Tile(64, keys, 4, 1)


def _tile(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exact: bool, unmasked: bool) -> Tile:
    if INTERPRETED.value:
        return INTERPRETED_TILE
    arch = family(torch.cuda.get_device_capability(q.device))
    tile = tile_of(arch, q.shape[3], k.shape[1], exact, unmasked and allows_descriptors(q, k, v))
    return tile if unmasked else with_mask(tile)


def allows_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether TMA descriptors can describe each [B, N, H, D]: 16-byte steps, none of them 0, and no cast afterwards."""
    for x in tensors:
        if x.element_size() != 2:
            return False
        steps = [s * x.element_size() for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
        if x.data_ptr() % 16 or x.numel() == 0 or any(s % 16 or s == 0 for s in steps):
            return False
    return True


def _descriptors(x: torch.Tensor, rows: int, head: int, tail: int) -> list:
    """Descriptors of x [B, N, H, D] as [B, H, N, D] for tiles of `rows` x head and x tail."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    turned = x.transpose(1, 2)
    # the step of a dimension of size 1 is free, but must be a multiple of 16 bytes
    steps = [s if n > 1 else 16 for s, n in zip(turned.stride(), turned.shape, strict=True)][:3]
    make = lambda width: TensorDescriptor(x, list(turned.shape), [*steps, 1], [1, 1, rows, width])
    return [make(head), make(tail) if tail else None]


def mask_arguments(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, list[int], tl.constexpr]:
    """The mask as the kernels read it, its strides (0 where it is broadcast), and its kind."""
    if mask is None:
        return None, [0, 0, 0, 0], NO_MASK
    steps = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, steps, FULL_MASK if steps[2] else KEY_MASK


def _codes_pay(q: torch.Tensor) -> bool:
    """Whether the GPU multiplies int8 faster than 16 bits: sm_100 has such products on its old path only."""
    return INTERPRETED.value or family(torch.cuda.get_device_capability(q.device)) != 100


def attention_triton(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    scale: float,
    precision: str,
    tile: Tile | None = None,
) -> None:
    """Fills contiguous out [B, N, H, D] and lse [B, H, N]. float16 stays float16 in "bf16"; `tile` replaces the table's."""
    (B, N, H, D), (M, heads) = q.shape, k.shape[1:3]
    if out.numel() == 0:
        return
    if precision == "int8" and _codes_pay(q):
        from fastdiff.kernels.attention_int8_launch import attention_int8_triton

        attention_int8_triton(out, lse, q, k, v, mask, key_lengths, scale)
        return
    exact = precision == "f32"
    tile = tile or _tile(q, k, v, exact, mask is None and key_lengths is None)
    HEAD, TAIL = split(D)
    mask, steps, kind = mask_arguments(mask)
    dtype = _TYPES[torch.bfloat16 if q.dtype == torch.float32 and not exact else q.dtype]
    operands = [q, None, k, None, v, None]
    if tile.tma:
        operands = [
            d
            for x, rows in zip((q, k, v), tile[:1] + tile[1:2] * 2, strict=True)
            for d in _descriptors(x, rows, HEAD, TAIL)
        ]
    tiles = triton.cdiv(N, tile.queries)
    attention_kernel[(tiles * B * H,)](
        *(*operands, mask, key_lengths, out, lse, N, M, H, H // heads, tiles),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps, scale * LOG2E.value),
        D=D,
        HEAD=HEAD,
        TAIL=TAIL,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        MASK=kind.value,
        POSITIVE=scale > 0 and mask is None,
        SINGLE=M <= tile.keys,
        EVEN=tile.tma and M % tile.keys == 0,
        DTYPE=dtype,
        WEIGHTS=tl.float32 if exact else dtype,
        PRECISION="tf32x3" if exact else "ieee",
        TMA=tile.tma,
        **tile.options,
    )
