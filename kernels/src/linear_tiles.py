"""Which tile of the linear kernel serves a call: tables per architecture, and a choice by how evenly blocks are spread."""

from typing import NamedTuple


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


def many_tile(arch: int, rows: int, columns: int, processors: int, tma: bool, plain: bool) -> Tile:
    """The tile that needs the least time for [rows, columns], by what the busiest multiprocessor has to do.

    tma    x and weight allow descriptors
    plain  they are multiplied as they come, and one sum is kept
    """
    tiles = TILES[arch] if plain and (tma or arch == 80) else [lighter(tile, tma) for tile in TILES[arch][1:]]
    return min(tiles, key=lambda tile: _time(tile, rows, columns, processors))


def lighter(tile: Tile, tma: bool) -> Tile:
    """A tile for loops that need more registers: those of pointers, casts or a second sum."""
    return tile._replace(tma=tile.tma and tma, shared=1)


def _time(tile: Tile, rows: int, columns: int, processors: int) -> float:
    blocks = -(-rows // tile.rows) * -(-columns // tile.columns)
    return -(-blocks // processors) * tile.rows * tile.columns / tile.rate
