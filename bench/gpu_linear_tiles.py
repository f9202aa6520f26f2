"""`python -m bench.gpu_linear_tiles [--seconds S] [--keep]`: times every tile of the linear kernel on the GPU present.

For each shape of bench/cases/linear.py, and for int8 and bfloat16, the tiles of kernels/src/linear_tiles.py and their
neighbours, in a captured graph over rotating buffers. One line each, the fastest first, the one that the table chooses
marked: what `rate` and the order of the tables are set by. --keep stores the table's fastest tile of each product of many
rows where later processes find it, as `python -m fastdiff tune` does.
"""

import argparse
import sys
from collections.abc import Iterator

import torch

from bench.cases.linear import GPU_SHAPES
from bench.gpu_solver import FLIGHT, captured
from bench.timing import interleave
from fastdiff.kernels import tuned
from fastdiff.kernels.linear_launch import linear_triton
from fastdiff.kernels.linear_tiles import FEW, FEW_ROWS, TILES, Product, Tile, few_tile, many_tile

HEAD = "| M x K x N | type | tile | us | TFLOP/s |\n|---|---|---|---|---|"


def candidates(arch: int, rows: int) -> list[Tile]:
    """The tiles of an architecture's table, and each with one stage less or more and with half the parts."""
    table = [t for t in FEW[arch] if t.rows >= rows][:1] if rows <= FEW_ROWS else list(TILES[arch])
    more = [tile._replace(stages=tile.stages + step) for tile in table for step in (-1, 1)]
    more += [tile._replace(parts=tile.parts // 2) for tile in table if tile.parts > 1]
    more += [tile._replace(columns=32, warps=2) for tile in table if rows <= 32]
    return table + more


def calls(M: int, K: int, N: int, dtype: torch.dtype, tile: Tile, device: str) -> list:
    """The same product on as many buffers as no cache holds."""
    sets = min(max(int(FLIGHT / ((M + N) * K * dtype.itemsize + 2 * M * N)), 2), 16)
    make = lambda *shape: torch.randint(-127, 128, shape, device=device).to(dtype)
    scale = torch.full((N,), 1e-4, device=device) if dtype == torch.int8 else None
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    each = [(make(M, K), make(N, K)) for _ in range(sets)]
    rest = (dtype, None, "none", None, None, 0, None, tile)
    return [lambda x=x, w=w: linear_triton(out, x, K, None, w, scale, 0, *rest) for x, w in each]


def records(shapes, machine: tuned.Machine, device: str, seconds: float, capture=captured) -> Iterator[dict]:
    """One record per shape, type and tile that compiles and fits."""
    for M, K, N in shapes:
        for dtype in (torch.int8, torch.bfloat16):
            ready, sets = {}, {}
            for tile in candidates(machine.arch, M):
                runs = calls(M, K, N, dtype, tile, device)
                try:
                    ready[tile] = capture(lambda runs=runs: [run() for run in runs], device)
                    sets[tile] = len(runs)
                except RuntimeError as error:  # more shared memory than the GPU has
                    yield {"shape": (M, K, N), "type": dtype, "tile": tile, "skipped": str(error).splitlines()[0]}
            chosen = _chosen(machine, Product(M, N, K, dtype))
            for tile, timing in sorted(interleave(ready, seconds).items(), key=lambda item: item[1].median_us):
                us = timing.median_us / sets[tile]
                found = {"us": us, "tflops": 2e-6 * M * K * N / us, "chosen": tile == chosen}
                yield {"shape": (M, K, N), "type": dtype, "tile": tile, **found}


def _chosen(machine: tuned.Machine, product: Product) -> Tile:
    if product.rows <= FEW_ROWS:
        return few_tile(machine.arch, product.rows, product.columns, machine.processors)
    return many_tile(machine, product)


def kept(found: list[dict], arch: int) -> dict[str, list]:
    """The fastest tile of the table for each product of many rows, as tuned.save takes them."""
    tiles = {}
    for record in found:
        (M, K, N), tile = record["shape"], record["tile"]
        if M > FEW_ROWS and tile in TILES[arch] and "us" in record:
            tiles.setdefault(Product(M, N, K, record["type"]).key, list(tile))
    return tiles


def line(record: dict) -> str:
    """One row of the table."""
    shape, tile = " x ".join(map(str, record["shape"])), tuple(record["tile"])
    start = f"| {shape} | {str(record['type'])[6:]} | {tile} |"
    if "skipped" in record:
        return f"{start} skipped: {record['skipped']} | |"
    return f"{start} {record['us']:.1f} | {record['tflops']:.0f}{' (chosen)' if record['chosen'] else ''} |"


def main(seconds: float, keep: bool) -> int:
    if not torch.cuda.is_available():
        print("bench.gpu_linear_tiles: torch sees no CUDA GPU; run it on a machine that has one", file=sys.stderr)
        return 2
    machine, found = tuned.machine_of(torch.cuda.current_device()), []
    print(HEAD)
    for record in records(GPU_SHAPES, machine, "cuda", seconds):
        found.append(record)
        print(line(record), flush=True)
    if keep:
        path = tuned.own_file(machine.name)
        tuned.save(path, machine.name, kept(found, machine.arch))
        print(f"tiles are in {path}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.2, help="per tile")
    parser.add_argument("--keep", action="store_true", help="store the fastest")
    sys.exit(main(**vars(parser.parse_args())))
