"""Weights as kernels read them: panels for CPUs, rows for GPUs.

panels  blocks of 16 columns of the result, in which a row of 64 bytes is one step along K: [ceil(N / 16), steps, 16, g]
rows    W itself, [N padded to 16, K padded to 16 bytes]

`pack` and its relatives take the layout; by default it is that of the weight's device. What they give is told apart by
its number of dimensions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

PANEL = 16  # columns of the result that are padded and paired together
LINE = 16  # bytes that a row is padded to
LAYOUTS = ("panels", "rows")
_PANEL_TYPES = (torch.float32, torch.bfloat16, torch.int8)


def packed_k(dtype: torch.dtype) -> int:
    """How many consecutive k one column has in a step of a panel: 4 int8, 2 bfloat16, 1 float32."""
    return {torch.int8: 4, torch.bfloat16: 2}.get(dtype, 1)


def layout_of(device: torch.device, layout: str | None = None) -> str:
    """The layout, by default that of a device's kernels. ValueError for an unknown one."""
    layout = layout or ("rows" if device.type == "cuda" else "panels")
    if layout not in LAYOUTS:
        raise ValueError(f"pack: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout


def in_rows(packed: torch.Tensor) -> bool:
    """Whether a packed weight is in rows."""
    return packed.dim() == 2


def refuse_rows(packed: torch.Tensor) -> str | None:
    """Why a CPU kernel cannot read a packed weight, or None."""
    return 'the weight is packed in rows, for GPUs; pack it with layout="panels"' if in_rows(packed) else None


def refuse_panels(packed: torch.Tensor) -> str | None:
    """Why a GPU kernel cannot read a packed weight, or None."""
    return None if in_rows(packed) else 'the weight is packed in panels, for CPUs; pack it with layout="rows"'


def padded_columns(packed: torch.Tensor) -> int:
    """N of a packed weight, padded to 16."""
    return packed.shape[0] * (1 if in_rows(packed) else PANEL)


def holds(packed: torch.Tensor, K: int) -> bool:
    """Whether `pack` can have made this of a weight [N, K]. Weights that a reference widened to float64 pass."""
    if packed.dim() not in (2, 4):
        return False
    unit = _line(packed.dtype) if in_rows(packed) else packed_k(packed.dtype)
    return packed.dtype == torch.float64 or packed.shape[1] == -(-K // unit) * (unit if in_rows(packed) else 1)


def holds_int4(packed: torch.Tensor, K: int) -> bool:
    """Whether `pack_int4` can have made this of codes [N, K]."""
    steps = -(-K // (2 * LINE)) * LINE if in_rows(packed) else K // 8
    return packed.dim() in (2, 4) and packed.dtype == torch.uint8 and packed.shape[1] == steps


def pack(weight: torch.Tensor, layout: str | None = None) -> torch.Tensor:
    """Packs a weight for `linear` and its int8 relatives.

    weight  [N, K] float32, bfloat16, or int8 in [-127, 127]; in rows also float16
    panels  [ceil(N / 16), ceil(K / g), 16, g] in the weight's dtype, g = 1, 2 or 4; padded with zeros
    rows    [N padded to 16, K padded to 16 bytes], padded with zeros
    """
    rows = layout_of(weight.device, layout) == "rows"
    known = (*_PANEL_TYPES, torch.float16) if rows else _PANEL_TYPES
    if weight.dtype not in known or weight.dim() != 2:
        kinds = ", ".join(str(dtype)[6:] for dtype in known)
        raise TypeError(f"pack: weight must be {kinds} [N, K], got {weight.dtype} {list(weight.shape)}")
    K = weight.shape[1]
    if rows:
        return F.pad(weight, (0, -K % _line(weight.dtype), 0, -weight.shape[0] % PANEL)).contiguous()
    g = packed_k(weight.dtype)
    padded = F.pad(weight, (0, -K % g, 0, -weight.shape[0] % PANEL))
    panels, steps = padded.shape[0] // PANEL, padded.shape[1] // g
    return padded.view(panels, PANEL, steps, g).permute(0, 2, 1, 3).contiguous()


def unpack(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The weight [N, K] that `pack` was given."""
    if in_rows(packed):
        return packed[:N, :K]
    panels, steps, _, g = packed.shape
    return packed.permute(0, 2, 1, 3).reshape(panels * PANEL, steps * g)[:N, :K]


def pack_int4(codes: torch.Tensor, layout: str | None = None) -> torch.Tensor:
    """Packs 4-bit codes for `linear_w4a16` and `linear_w4a8`.

    codes   [N, K] int8 in [-8, 7], K a multiple of 8
    panels  [ceil(N / 16), K / 8, 16, 4] uint8; byte j of a step has the code of k + j in its low half and that of
            k + 4 + j in its high half, both plus 8
    rows    [N padded to 16, K / 2 padded to 16] uint8; byte j has the code of 2j in its low half and that of 2j + 1 in
            its high half, both as four bits of two's complement
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] % 8:
        raise TypeError(f"pack_int4: codes must be int8 [N, multiple of 8], got {codes.dtype} {list(codes.shape)}")
    N, K = codes.shape
    if layout_of(codes.device, layout) == "rows":
        halves = F.pad(codes, (0, -K % (2 * LINE), 0, -N % PANEL)).view(torch.uint8) & 15
        return halves[:, ::2] | (halves[:, 1::2] << 4)
    nibbles = (F.pad(codes, (0, 0, 0, -N % PANEL)) + 8).to(torch.uint8).view(-(-N // PANEL), PANEL, K // 8, 2, 4)
    return (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).permute(0, 2, 1, 3).contiguous()


def unpack_int4(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The codes [N, K] int8 that `pack_int4` was given."""
    if in_rows(packed):
        nibbles = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        return ((nibbles ^ 8).to(torch.int8) - 8)[:N, :K]
    nibbles = torch.stack([packed & 15, packed >> 4], dim=3).to(torch.int8) - 8  # [panels, K / 8, 16, 2, 4]
    return nibbles.permute(0, 2, 1, 3, 4).reshape(packed.shape[0] * PANEL, packed.shape[1] * 8)[:N, :K]


def interleave(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 rows of two tensors [N, ...] in turn, as pair activations (GEGLU, SwiGLU) want them.

    out  [2 * ceil(N / 16) * 16, ...]; rows past N are zero. For weights, scales, sums and biases alike.
    """
    pad = (0, 0) * (value.dim() - 1) + (0, -value.shape[0] % PANEL)
    blocks = [F.pad(t, pad).unflatten(0, (-1, 1, PANEL)) for t in (value, gate)]
    return torch.cat(blocks, dim=1).flatten(0, 2)


def pack_pairs(value: torch.Tensor, gate: torch.Tensor, layout: str | None = None) -> torch.Tensor:
    """Packs two weights [N, K] for a pair activation: columns 32p.. are value columns 16p.., 32p + 16.. gate columns 16p..."""
    return pack(interleave(value, gate), layout)


def pack_pairs_int4(value: torch.Tensor, gate: torch.Tensor, layout: str | None = None) -> torch.Tensor:
    """The same for 4-bit codes."""
    return pack_int4(interleave(value, gate), layout)


def weight_sums(codes: torch.Tensor) -> torch.Tensor:
    """Sums of int8 codes over K. [N, K] int8 -> [N] int32."""
    return codes.sum(dim=1, dtype=torch.int32)


def pack_conv(weight: torch.Tensor, channels: Sequence[int], layout: str | None = None) -> torch.Tensor:
    """Packs the weight of `conv2d` and `conv2d_w8a8`.

    weight    [N, sum(channels), k, k] float32, bfloat16, or int8 in [-127, 127]; in rows also float16
    channels  of the one or two segments that the input comes in
    out       as pack gives it; K is, per segment, [kernel row][kernel column][channel, padded with zeros]: to a step of
              panels, to 16 bytes in rows
    """
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[1] != sum(channels):
        raise ValueError(f"pack_conv: weight must be [N, {sum(channels)}, k, k], got {list(weight.shape)}")
    layout = layout_of(weight.device, layout)
    group = _line(weight.dtype) if layout == "rows" else packed_k(weight.dtype)
    segments = weight.permute(0, 2, 3, 1).split(list(channels), dim=3)
    return pack(torch.cat([F.pad(s, (0, -s.shape[3] % group)).flatten(1) for s in segments], dim=1), layout)


def unpack_conv(packed: torch.Tensor, N: int, channels: Sequence[int], kernel: int) -> torch.Tensor:
    """The weight [N, sum(channels), kernel, kernel] that `pack_conv` was given."""
    padded = padded_channels(packed, channels, kernel)
    flat = unpack(packed, N, kernel * kernel * sum(padded)).split([c * kernel * kernel for c in padded], dim=1)
    taps = [f.reshape(N, kernel, kernel, p)[..., :c] for f, p, c in zip(flat, padded, channels, strict=True)]
    return torch.cat(taps, dim=3).permute(0, 3, 1, 2)


def padded_channels(packed: torch.Tensor, channels: Sequence[int], kernel: int) -> list[int]:
    """Channels of each segment with the zeros that `pack_conv` put behind them. ValueError where none fit."""
    up = lambda group: [-(-c // group) * group for c in channels]
    if not in_rows(packed):
        return up(packed.shape[3])
    # by size and not by dtype: references widen weights; equal sizes are equal layouts
    fitting = [up(group) for group in (4, 8, 16) if kernel * kernel * sum(up(group)) == packed.shape[1]]
    if not fitting:
        raise ValueError(
            f"pack_conv: {list(packed.shape)} is not packed from {list(channels)} channels, kernel {kernel}"
        )
    return fitting[0]


def conv_weight_sums(codes: torch.Tensor, channels: Sequence[int]) -> torch.Tensor:
    """Sums of int8 codes [N, C, k, k] over the channels of each segment: [segments, k * k, N] int32."""
    sums = [s.sum(dim=1, dtype=torch.int32).flatten(1).T for s in codes.split(list(channels), dim=1)]
    return torch.stack(sums)


def _line(dtype: torch.dtype) -> int:
    """Elements of 16 bytes."""
    return LINE // dtype.itemsize
