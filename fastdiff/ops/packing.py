"""Weights as CPU kernels read them: panels of 16 columns, in which a row of 64 bytes is one step along K."""

import torch
import torch.nn.functional as F

PANEL = 16  # output columns of a panel


def packed_k(dtype: torch.dtype) -> int:
    """How many consecutive k one column has in a step: 4 int8, 2 bfloat16, 1 float32."""
    return {torch.int8: 4, torch.bfloat16: 2}.get(dtype, 1)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Packs a weight for `linear` and its int8 relatives.

    weight  [N, K] float32, bfloat16, or int8 in [-127, 127]
    out     [ceil(N / 16), ceil(K / g), 16, g] in the weight's dtype, g = 1, 2 or 4; padded with zeros
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.int8) or weight.dim() != 2:
        raise TypeError(
            f"pack: weight must be float32, bfloat16 or int8 [N, K], got {weight.dtype} {list(weight.shape)}"
        )
    N, K = weight.shape
    g = packed_k(weight.dtype)
    padded = F.pad(weight, (0, -K % g, 0, -N % PANEL))
    panels, steps = padded.shape[0] // PANEL, padded.shape[1] // g
    return padded.view(panels, PANEL, steps, g).permute(0, 2, 1, 3).contiguous()


def unpack(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The weight [N, K] that `pack` was given."""
    panels, steps, _, g = packed.shape
    return packed.permute(0, 2, 1, 3).reshape(panels * PANEL, steps * g)[:N, :K]


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Packs 4-bit codes for `linear_w4a16` and `linear_w4a8`.

    codes  [N, K] int8 in [-8, 7], K a multiple of 8
    out    [ceil(N / 16), K / 8, 16, 4] uint8; byte j of a step has the code of k + j in its low half and that of
           k + 4 + j in its high half, both plus 8
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] % 8:
        raise TypeError(f"pack_int4: codes must be int8 [N, multiple of 8], got {codes.dtype} {list(codes.shape)}")
    N, K = codes.shape
    nibbles = (F.pad(codes, (0, 0, 0, -N % PANEL)) + 8).to(torch.uint8).view(-(-N // PANEL), PANEL, K // 8, 2, 4)
    return (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).permute(0, 2, 1, 3).contiguous()


def unpack_int4(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The codes [N, K] int8 that `pack_int4` was given."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=3).to(torch.int8) - 8  # [panels, K / 8, 16, 2, 4]
    return nibbles.permute(0, 2, 1, 3, 4).reshape(packed.shape[0] * PANEL, packed.shape[1] * 8)[:N, :K]


def interleave(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 rows of two tensors [N, ...] in turn, as pair activations (GEGLU, SwiGLU) want them.

    out  [2 * ceil(N / 16) * 16, ...]; rows past N are zero. For weights, scales, sums and biases alike.
    """
    pad = (0, 0) * (value.dim() - 1) + (0, -value.shape[0] % PANEL)
    blocks = [F.pad(t, pad).unflatten(0, (-1, 1, PANEL)) for t in (value, gate)]
    return torch.cat(blocks, dim=1).flatten(0, 2)


def pack_pairs(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Packs two weights [N, K] for a pair activation: panel 2p has value columns 16p.., panel 2p + 1 gate columns 16p..."""
    return pack(interleave(value, gate))


def pack_pairs_int4(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The same for 4-bit codes."""
    return pack_int4(interleave(value, gate))


def weight_sums(codes: torch.Tensor) -> torch.Tensor:
    """Sums of int8 codes over K. [N, K] int8 -> [N] int32."""
    return codes.sum(dim=1, dtype=torch.int32)


def pack_conv(weight: torch.Tensor, channels: tuple[int, ...] | list[int]) -> torch.Tensor:
    """Packs the weight of `conv2d` and `conv2d_w8a8`.

    weight    [N, sum(channels), k, k] float32, bfloat16, or int8 in [-127, 127]
    channels  of the one or two segments that the input comes in
    out       as pack gives it; K is, per segment, [kernel row][kernel column][channel, padded to a step with zeros]
    """
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[1] != sum(channels):
        raise ValueError(f"pack_conv: weight must be [N, {sum(channels)}, k, k], got {list(weight.shape)}")
    group = packed_k(weight.dtype)
    segments = weight.permute(0, 2, 3, 1).split(list(channels), dim=3)
    return pack(torch.cat([F.pad(s, (0, -s.shape[3] % group)).flatten(1) for s in segments], dim=1))


def unpack_conv(packed: torch.Tensor, N: int, channels: tuple[int, ...] | list[int], kernel: int) -> torch.Tensor:
    """The weight [N, sum(channels), kernel, kernel] that `pack_conv` was given."""
    steps, _, group = packed.shape[1:]
    padded = [-(-c // group) * group for c in channels]
    flat = unpack(packed, N, steps * group).split([c * kernel * kernel for c in padded], dim=1)
    taps = [f.reshape(N, kernel, kernel, p)[..., :c] for f, p, c in zip(flat, padded, channels, strict=True)]
    return torch.cat(taps, dim=3).permute(0, 3, 1, 2)


def conv_weight_sums(codes: torch.Tensor, channels: tuple[int, ...] | list[int]) -> torch.Tensor:
    """Sums of int8 codes [N, C, k, k] over the channels of each segment: [segments, k * k, N] int32."""
    sums = [s.sum(dim=1, dtype=torch.int32).flatten(1).T for s in codes.split(list(channels), dim=1)]
    return torch.stack(sums)
