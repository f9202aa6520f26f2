"""How kernels that need whole rows divide them: one table for every such kernel."""

from typing import NamedTuple

import triton

MAX_COLUMNS = 16_384  # of a row that stays in registers
TILE, MAX_TILE_COLUMNS = 2048, 1024  # elements of a tile for 4 warps: two 16-byte loads of bfloat16 a thread


class RowBlock(NamedTuple):
    """rows of one program, columns (a power of two), warps."""

    rows: int
    columns: int
    warps: int


# 16 to 32 elements a thread: two to four 16-byte loads of bfloat16 in flight. A function of the row's length only, so
# that a row's bits do not depend on how many others there are
ROW_BLOCKS = (
    RowBlock(16, 128, 4),
    RowBlock(8, 256, 4),
    RowBlock(4, 512, 4),
    RowBlock(2, 1024, 4),
    RowBlock(1, 2048, 4),
    RowBlock(1, 4096, 4),
    RowBlock(1, 8192, 8),
    RowBlock(1, MAX_COLUMNS, 16),
)


def row_block(n: int) -> RowBlock:
    """The entry for rows of n elements; the last one for longer rows."""
    columns = triton.next_power_of_2(n)
    return next((block for block in ROW_BLOCKS if block.columns >= columns), ROW_BLOCKS[-1])


def tile_of(n: int) -> tuple[int, int]:
    """Rows and columns of a tile, for kernels that need no whole rows of n elements."""
    columns = min(max(triton.next_power_of_2(n), 16), MAX_TILE_COLUMNS)
    return TILE // columns, columns
