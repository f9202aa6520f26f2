"""Which tile of the linear kernel serves a call: tables per architecture, and a choice by how evenly blocks are spread."""

import functools
from typing import NamedTuple

import torch

from fastdiff.kernels import tuned


class Tile(NamedTuple):
    """BLOCK_M rows, BLOCK_N columns, bytes of x along K; warps, stages, parts of the epilogue; tma: descriptors.

    shared  blocks that a multiprocessor has room for at a time
    rate    relative speed of a multiprocessor that is full of such blocks: what tiles of this size reach elsewhere
    """

    rows: int
    columns: int
    line: int
    warps: int
    stages: int
    parts: int = 1
    tma: bool = False
    shared: int = 1
    rate: float = 1.0

    @property
    def options(self) -> dict[str, int | bool]:
        # multiply-adds stay apart in the epilogue: without an activation its bits are the reference's
        most = 65_536 // (32 * self.warps * self.shared) // 8 * 8
        registers = {"maxnreg": most} if self.shared > 1 and most < 168 else {}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False, **registers}


FEW_ROWS = 64  # up to so many, weights are read once and decoded on the way
# 8- and 16-bit products of many rows. A line of 128 bytes is 128 or 64 of k; sm_120 has 99 KB of shared memory for one
# block, sm_80 163, the others 227. Chosen by registers and spills of what tests/aot_linear.py compiles, not yet by time:
# on sm_90 a full rate reads 48 bytes a cycle and multiprocessor from L2 with 128 x 256, 64 with 128 x 128, 96 with 64 x
# 128, and L2 is thought to give 30. Sums of int8 are waited for after each line (Triton 3.6 keeps only float32 ones in flight)
TILES: dict[int, tuple[Tile, ...]] = {
    80: (
        Tile(128, 256, 64, 8, 4, 4),
        Tile(128, 128, 64, 8, 4, 4, rate=0.9),
        Tile(64, 128, 64, 4, 4, 4, shared=2, rate=0.8),
        Tile(64, 64, 64, 4, 4, 2, shared=3, rate=0.6),
    ),
    90: (
        Tile(128, 256, 128, 8, 4, 4, True),
        Tile(128, 128, 128, 8, 3, 4, True, shared=2, rate=0.85),
        Tile(64, 128, 128, 4, 3, 4, True, shared=3, rate=0.65),
        Tile(64, 64, 128, 4, 4, 2, True, shared=3, rate=0.5),
    ),
    100: (
        Tile(128, 256, 128, 8, 4, 4, True),
        Tile(128, 128, 128, 8, 3, 4, True, rate=0.85),
        Tile(64, 128, 128, 4, 3, 4, True, shared=2, rate=0.65),
    ),
    120: (
        Tile(128, 128, 64, 8, 4, 4),
        Tile(64, 128, 64, 4, 4, 4, shared=2, rate=0.9),
        Tile(64, 64, 64, 4, 4, 2, shared=3, rate=0.7),
    ),
}
# up to 16, 32 and 64 rows, with weights as the left operand
FEW: dict[int, tuple[Tile, ...]] = {
    arch: (Tile(16, 64, 128, 4, stages), Tile(32, 64, 128, 4, stages), Tile(64, 64, 128, 4, stages))
    for arch, stages in ((80, 4), (90, 5), (100, 4), (120, 3))
}
EXACT = (Tile(16, 64, 128, 4, 3), Tile(32, 64, 128, 4, 3))  # float32 without tensor cores: few rows, many
INTERPRETED = Tile(32, 64, 32, 4, 1, 2)


def few_tile(arch: int, rows: int, columns: int, processors: int) -> Tile:
    """The tile for weights that are decoded in registers, and for few rows of any."""
    tile = next((tile for tile in FEW[arch] if tile.rows >= rows), FEW[arch][-1])
    scarce = -(-columns // tile.columns) < processors and tile.rows <= 32
    return tile._replace(columns=tile.columns // 2, warps=tile.warps // 2) if scarce else tile


class Product(NamedTuple):
    """Many rows times a weight of `columns`, in 16 or 8 bits.

    tma    x and weight allow descriptors
    plain  they are multiplied as they come, and one sum is kept
    """

    rows: int
    columns: int
    K: int
    dtype: torch.dtype
    tma: bool = True
    plain: bool = True

    @property
    def key(self) -> str:
        """What products that one measurement speaks for have in common: rows up to the next 2^k or 3 * 2^k."""
        power = 1 << (self.rows - 1).bit_length()
        rows = 3 * power // 4 if self.rows <= 3 * power // 4 else power
        kind = f"{'descriptors' if self.tma else 'pointers'}{'' if self.plain else ', cast or by group'}"
        return f"linear {str(self.dtype)[6:]}, {kind}: {rows} x {self.K} x {self.columns}"


@functools.lru_cache(4096)
def many_tile(machine: tuned.Machine, product: Product) -> Tile:
    """The tile that was measured for a product, or else the one that should need the least time.

    That is judged by what the busiest multiprocessor has to do.
    """

    def time(tile: Tile) -> float:
        blocks = -(-product.rows // tile.rows) * -(-product.columns // tile.columns)
        return -(-blocks // machine.processors) * tile.rows * tile.columns / tile.rate

    tiles = tiles_for(machine.arch, product)
    return tuned.choose(machine.name, product.key, tiles) or min(tiles, key=time)


def tiles_for(arch: int, product: Product) -> list[Tile]:
    """All tiles that can serve a product of many rows."""
    if product.plain and (product.tma or arch == 80):
        return list(TILES[arch])
    return [lighter(tile, product.tma) for tile in TILES[arch][1:]]


def lighter(tile: Tile, tma: bool) -> Tile:
    """A tile for loops that need more registers: those of pointers, casts or a second sum."""
    return tile._replace(tma=tile.tma and tma, shared=1)
