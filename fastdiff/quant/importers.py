"""Linear layers of other libraries' quantized checkpoints as our QTensors: the same numbers in another order."""

import torch

from fastdiff.quant.qtensor import QTensor
from fastdiff.quant.schemes import TensorSpec

Tensor = torch.Tensor


def from_int8(weight: Tensor, scale: Tensor) -> QTensor:
    """The int8 weight of torchao (`qdata`, `scale`) or ModelOpt (`weight`, `weight_scale`).

    weight  [N, K] int8;  scale  [N], [N, 1], or one for the whole matrix
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or scale.numel() not in (1, weight.shape[0]):
        raise ValueError(
            f"import: int8 [N, K] and one scale per row expected, got {weight.dtype} {list(weight.shape)}"
        )
    if bool((weight == -128).any()):
        raise ValueError("import: the code -128 has no place in a symmetric grid; dequantize and quantize again")
    scale = scale.float().reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
    return QTensor(weight.contiguous(), scale, None, TensorSpec("int8"))


def from_nunchaku(qweight: Tensor, wscales: Tensor) -> QTensor:
    """The int4 weight of a nunchaku SVDQuant layer, in groups of 64.

    qweight  [N, K / 2] int8, N a multiple of 128 and K of 64;  wscales  [K / 64, N]

    The layer's other tensors come through `nunchaku_vector` (bias, smooth_factor) and `nunchaku_low_rank`.
    """
    N, half = qweight.shape
    K = 2 * half
    if N % 128 or K % 64 or tuple(wscales.shape) != (K // 64, N):
        raise ValueError(
            f"import: qweight [N, K / 2] with N a multiple of 128, K of 64, and wscales [K / 64, N] expected, "
            f"got {list(qweight.shape)} and {list(wscales.shape)}"
        )
    n, k = torch.arange(N)[:, None], torch.arange(K)[None]
    word = ((n // 128) * (K // 64) + k // 64) * 8 + n % 128 // 16
    word = (word * 8 + n % 8) * 4 + k % 32 // 8  # lanes of a warp: 8 along N, 4 along K
    word = word * 4 + n % 16 // 8 * 2 + k % 64 // 32  # four registers per lane
    byte = qweight.contiguous().view(torch.uint8).flatten()[word * 4 + k % 8 // 2]
    codes = (byte >> (k % 2 * 4).to(torch.uint8)) & 15
    codes = (codes ^ 8).to(torch.int8) - 8
    tiles = wscales.float().reshape(N // 128, K // 64, 128)[:, :, _vector_order()]
    scale = tiles.permute(0, 2, 1).reshape(N, K // 64).contiguous()
    return QTensor(codes, scale, None, TensorSpec("int4", "group", 64))


def nunchaku_vector(packed: Tensor) -> Tensor:
    """A bias or smooth_factor of nunchaku, [N] with N a multiple of 128, in the order of its channels."""
    return packed.reshape(-1, 128)[:, _vector_order()].reshape(-1)


def nunchaku_low_rank(packed: Tensor, down: bool) -> Tensor:
    """A low-rank factor of nunchaku: proj_down [K, r] becomes [r, K], proj_up [N, r] stays [N, r]; multiples of 16."""
    channels, rank = packed.shape
    i, j = torch.arange(16)[:, None], torch.arange(16)[None]
    within = (i % 8 * 4 + j % 8 // 2) * 8 + i // 8 * 4 + j // 8 * 2 + j % 2
    tiles = packed.reshape(channels // 16, rank // 16, 256)[:, :, within]  # [C / 16, r / 16, 16, 16]
    if down:
        return tiles.permute(1, 2, 0, 3).reshape(rank, channels)
    return tiles.permute(0, 2, 1, 3).reshape(channels, rank)


def _vector_order() -> Tensor:
    """Where the 128 channels of a tile are: two of eight per lane, then the same lanes' next eight."""
    n = torch.arange(128)
    return n // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2
