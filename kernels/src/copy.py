"""`copy` in Triton: contract in `fastdiff/ops/copy.py`."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.rounding import cast

OUTER = 4  # dimensions beside the two of a tile
LINE = 1024  # elements of a tile whose source and target are contiguous in the same dimension
SQUARE = 64  # sides of a tile that is transposed through shared memory: 128 bytes of bfloat16
OPTIONS = {"num_warps": 4}
_PLAIN = [*(f"size{i}" for i in range(OUTER)), "tiles_a", "tiles_b"]


@triton.jit(do_not_specialize=_PLAIN)
def copy_kernel(
    x_ptr,
    out_ptr,
    size_a,
    from_a,
    to_a,
    size_b,
    from_b,
    to_b,
    tiles_a,
    tiles_b,
    size0,
    from0,
    to0,
    size1,
    from1,
    to1,
    size2,
    from2,
    to2,
    size3,
    from3,
    to3,
    A: tl.constexpr,
    B: tl.constexpr,
):
    """Program (indices 3 .. 0 of the outer dimensions, tile of a, tile of b); `from` are strides of x, `to` of out.

    The compiler reads along the dimension where x is contiguous, writes along that of out, and turns tiles in between.
    """
    program = tl.program_id(0).to(tl.int64)
    b = (program % tiles_b) * B + tl.arange(0, B)[None, :]
    program = program // tiles_b
    a = (program % tiles_a) * A + tl.arange(0, A)[:, None]
    program = program // tiles_a
    source = x_ptr + (program % size0) * from0
    target = out_ptr + (program % size0) * to0
    program = program // size0
    source += (program % size1) * from1
    target += (program % size1) * to1
    program = program // size1
    source += (program % size2) * from2
    target += (program % size2) * to2
    program = program // size2
    source += program * from3
    target += program * to3
    inside = (a < size_a) & (b < size_b)
    x = tl.load(source + a * from_a + b * from_b, mask=inside)
    if x.dtype != out_ptr.dtype.element_ty:
        x = cast(x.to(tl.float32), out_ptr.dtype.element_ty)
    tl.store(target + a * to_a + b * to_b, x, mask=inside)


def merged(shape: tuple, source: tuple, target: tuple) -> list[tuple[int, int, int]]:
    """(size, stride of x, stride of out) of as few dimensions as describe both, innermost last."""
    dims: list[tuple[int, int, int]] = []
    for size, a, b in zip(shape, source, target, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * a and dims[-1][2] == size * b:
            dims[-1] = (dims[-1][0] * size, a, b)
        else:
            dims.append((size, a, b))
    return dims or [(1, 1, 1)]


def tiled(dims: list[tuple[int, int, int]]) -> tuple[tuple, tuple, list[tuple], tuple[int, int]]:
    """The dimensions a and b of a tile, the others, and the tile's sides.

    b is the innermost of out; a is where x is contiguous, or else the one before b.
    """
    *rest, b = dims
    if not rest:
        return (1, 0, 0), b, [], (1, LINE)
    transposed = b[1] != 1 and any(stride == 1 for _, stride, _ in rest)
    a = next(d for d in reversed(rest) if d[1] == 1) if transposed else rest[-1]
    rest.remove(a)
    width = min(triton.next_power_of_2(b[0]), LINE)
    return a, b, rest, (SQUARE, SQUARE) if transposed else (LINE // width, width)


def copy_triton(out: torch.Tensor, x: torch.Tensor) -> None:
    """Fills contiguous out from x of any strides and at most 6 dimensions."""
    if out.numel() == 0:
        return
    a, b, rest, (A, B) = tiled(merged(x.shape, x.stride(), out.stride()))
    outer = [*reversed(rest), *[(1, 0, 0)] * (OUTER - len(rest))]
    tiles = triton.cdiv(a[0], A), triton.cdiv(b[0], B)
    grid = (tiles[0] * tiles[1] * out.numel() // (a[0] * b[0]),)
    copy_kernel[grid](x, out, *a, *b, *tiles, *(v for d in outer for v in d), A=A, B=B, **OPTIONS)
