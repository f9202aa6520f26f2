"""Chooses how a linear layer is computed and launches it."""

import torch
import triton.language as tl

from fastdiff.kernels import linear_tiles, tuned
from fastdiff.kernels.linear import linear_kernel
from fastdiff.kernels.linear_expand import expand
from fastdiff.kernels.linear_tiles import FEW_ROWS, Product, Tile
from fastdiff.kernels.rounding import INTERPRETED

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
_KINDS = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}  # of pairs: what the gate goes through


def linear_triton(
    out: torch.Tensor,
    x: torch.Tensor,
    x_stride: int,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    group: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    activation: str,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_stride: int,
    out_scale: torch.Tensor | None,
    tile: Tile | None = None,
) -> None:
    """Fills contiguous out [..., N] with residual + gate * activation(x_scale * (x @ W.T) * scale + bias).

    x        [..., K], rows x_stride elements apart; x_scale [1] or one per row
    weight   packed in rows: floats, int8 codes, or 4-bit codes; scale [wide], with 4 bits [wide, K / group]
    dtype    what is multiplied; int8 for codes of x
    tile     replaces the tables'
    """
    if out.numel() == 0:
        return
    N, rows, K = out.shape[-1], out.numel() // out.shape[-1], x.shape[-1]
    grouped, few = weight.dtype == torch.uint8, rows <= FEW_ROWS
    if weight.dtype != dtype and dtype != torch.float32 and not few:
        weight, scale, grouped = _expanded(weight, scale, group, dtype, out.dtype)
    turned, padded = few or weight.dtype != dtype, weight.shape[0]
    tile = tile or _tile(x, x_stride, weight, rows, dtype, grouped, turned)
    block = _block(tile, dtype, group if grouped else 0)
    operands = (x, weight)
    if tile.tma:
        operands = (
            _descriptor(x, (rows, K), x_stride, (tile.rows, block)),
            _descriptor(weight, weight.shape, weight.shape[1], (tile.columns, block)),
        )
    blocks = -(-rows // tile.rows) * -(-padded // tile.columns)  # triton.cdiv takes 2 us
    wide = padded if activation in _KINDS else N
    step = 0 if x_scale is None or x_scale.numel() == 1 else 1
    gates = (1, 0) if gate is None else (rows // gate.shape[0], gate.stride(0))
    linear_kernel[(blocks,)](
        *(*operands, x_scale, scale, bias, gate, residual, out_scale, out, rows, K, N, wide, padded, group),
        *(x_stride, weight.shape[1], step, *gates, residual_stride),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=block,
        PARTS=tile.parts,
        DTYPE=_TYPES[dtype],
        GROUPED=grouped,
        TURNED=turned,
        EVEN=K % block == 0,
        TMA=tile.tma,
        KIND=_KINDS.get(activation, activation),
        PAIRS=activation in _KINDS,
        **tile.options,
    )


def _expanded(weight, scale, group, dtype, out_dtype):
    """Weights that a product of many rows reads more than once, in its type: (weight, scale, whether it is by group).

    4 bits times their scale are rounded to 16, as results of 16 bits are; where a result is wider, and in int8, codes
    stay whole and sums of groups are scaled.
    """
    if weight.dtype != torch.uint8:
        return expand(weight, None, group, dtype), scale, False
    if dtype == torch.int8 or out_dtype == torch.float32:
        return expand(weight, None, group, dtype), scale, True
    return expand(weight, scale, group, dtype), None, False


def _tile(x, x_stride: int, weight, rows: int, dtype: torch.dtype, grouped: bool, turned: bool) -> Tile:
    """The tables' tile for a product."""
    if INTERPRETED.value:
        return linear_tiles.INTERPRETED
    if dtype == torch.float32:
        return linear_tiles.EXACT[rows > linear_tiles.EXACT[0].rows]
    machine, columns = tuned.machine_of(x.device.index), weight.shape[0]
    if turned:
        return linear_tiles.few_tile(machine.arch, rows, columns, machine.processors)
    same = x.dtype == weight.dtype
    tma = same and allows_descriptor(x, x_stride) and allows_descriptor(weight, weight.shape[1])
    return linear_tiles.many_tile(machine, Product(rows, columns, x.shape[-1], dtype, tma, same and not grouped))


def _block(tile: Tile, dtype: torch.dtype, group: int) -> int:
    """k at a time: the tile's line, or the largest of 32, 64, ... of it that divides a group."""
    block = max(tile.line // dtype.itemsize, 32)
    while group and group % block:
        block //= 2
    return block


def allows_descriptor(x: torch.Tensor, stride: int) -> bool:
    """Whether a TMA descriptor can describe rows that are `stride` elements apart: 16-byte steps, none of them 0."""
    return x.numel() > 0 and stride > 0 and x.data_ptr() % 16 == 0 and stride * x.element_size() % 16 == 0


def _descriptor(x: torch.Tensor, shape, stride: int, block: tuple[int, int]):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(shape), [stride, 1], list(block))
