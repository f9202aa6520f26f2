"""Which tile of the linear kernel serves a call: tables per architecture, and a choice by how full the last wave is."""

from typing import NamedTuple


class Tile(NamedTuple):
    """BLOCK_M rows, BLOCK_N columns, bytes of x along K; warps, stages, parts of the epilogue; tma: descriptors.

    shared  blocks that fit a multiprocessor at a time, by registers and shared memory
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
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


FEW_ROWS = 64  # up to so many, weights are read once and decoded on the way
# 8- and 16-bit products of many rows; line is 128 bytes or 64: 128 or 64 int8, 64 or 32 of 16 bits. sm_120 has 99 KB of
# shared memory for one block, sm_80 163, the others 227
TILES: dict[int, tuple[Tile, ...]] = {
    80: (
        Tile(128, 256, 64, 8, 4, 2),
        Tile(128, 128, 64, 8, 4, 2, shared=1, rate=0.9),
        Tile(64, 128, 64, 4, 4, 2, shared=2, rate=0.8),
        Tile(64, 64, 64, 4, 4, 1, shared=3, rate=0.6),
    ),
    90: (
        Tile(128, 256, 128, 8, 3, 2, True),
        Tile(128, 128, 128, 8, 3, 2, True, shared=2, rate=0.9),
        Tile(64, 128, 128, 4, 3, 2, True, shared=3, rate=0.8),
        Tile(64, 64, 128, 4, 4, 1, True, shared=3, rate=0.6),
    ),
    100: (
        Tile(128, 256, 128, 8, 3, 2, True),
        Tile(128, 128, 128, 8, 3, 2, True, shared=2, rate=0.9),
        Tile(64, 128, 128, 4, 3, 2, True, shared=3, rate=0.8),
    ),
    120: (
        Tile(128, 128, 64, 8, 4, 2),
        Tile(64, 128, 64, 4, 4, 2, shared=2, rate=0.9),
        Tile(64, 64, 64, 4, 4, 1, shared=3, rate=0.7),
    ),
}
# up to 16, 32 and 64 rows, weights on the left; 128 bytes of x at a time would be 64 k of 16 bits
FEW: dict[int, tuple[Tile, ...]] = {
    arch: (Tile(16, 64, 128, 4, stages), Tile(32, 64, 128, 4, stages), Tile(64, 64, 128, 4, stages))
    for arch, stages in ((80, 4), (90, 5), (100, 4), (120, 3))
}
EXACT = (Tile(16, 64, 128, 4, 3), Tile(64, 64, 64, 4, 3))  # float32 without tensor cores: few rows, many
INTERPRETED = Tile(32, 64, 32, 4, 1, 2)


def few_tile(arch: int, rows: int) -> Tile:
    """The tile for weights that are decoded in registers, and for few rows of any."""
    return next((tile for tile in FEW[arch] if tile.rows >= rows), FEW[arch][-1])


def many_tile(arch: int, rows: int, columns: int, processors: int, tma: bool) -> Tile:
    """The tile that needs the least time for [rows, columns], by waves of blocks over the multiprocessors."""
    tiles = TILES[arch] if tma else tuple(without_tma(tile) for tile in TILES[arch])
    return min(tiles, key=lambda tile: _time(tile, rows, columns, processors))


def without_tma(tile: Tile) -> Tile:
    """The same tile with pointers, which need registers: half the stages' line."""
    return tile._replace(tma=False)


def _time(tile: Tile, rows: int, columns: int, processors: int) -> float:
    blocks = -(-rows // tile.rows) * -(-columns // tile.columns)
    waves = -(-blocks // (processors * tile.shared))
    return waves * tile.shared * tile.rows * tile.columns / tile.rate
