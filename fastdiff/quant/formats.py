"""The 4 and 8 bit floating formats: their values, and rounding to the nearest code with ties to even."""

import torch

Tensor = torch.Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# magnitudes of e2m1; bit 3 of a code is the sign
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# quantiles of a normal distribution, 0 included (Dettmers et al. 2023, appendix E)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def to_e4m3(x: Tensor) -> Tensor:
    """Rounds to float8 e4m3: ties to even, magnitudes above 448 become 448, NaN stays NaN."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(x: Tensor) -> Tensor:
    """Codes 0..15 uint8 of the nearest e2m1 values, ties to even, magnitudes above 6 become 6."""
    table = torch.tensor(E2M1, dtype=torch.float32, device=x.device)
    middle = (table[1:] + table[:-1]) / 2
    magnitude = x.abs().float().contiguous()
    index = torch.bucketize(magnitude, middle)  # a tie goes to the lower neighbour
    tie = magnitude == middle[index.clamp(max=6)]
    index = index + (tie & (index % 2 == 1))
    return (index + 8 * (x < 0)).to(torch.uint8)


def from_e2m1(codes: Tensor) -> Tensor:
    """The float32 values of e2m1 codes."""
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float32, device=codes.device)
    return table[codes.long()]


def to_nf4(x: Tensor) -> Tensor:
    """Codes 0..15 uint8 of the nearest NF4 values; x in [-1, 1]."""
    table = torch.tensor(NF4, dtype=torch.float32, device=x.device)
    return torch.bucketize(x.float().contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)


def from_nf4(codes: Tensor) -> Tensor:
    """The float32 values of NF4 codes."""
    return torch.tensor(NF4, dtype=torch.float32, device=codes.device)[codes.long()]


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The e8m0 scale of a block of e2m1 codes: 2^(floor(log2 amax) - 2), 2^-127 at the least."""
    _, exponent = torch.frexp(amax.float())
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float32), (exponent - 3).clamp(-126, 127))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes per byte: even k in the low nibble, odd k in the high one.

    codes  [..., K] int8 in -8..7 or uint8 in 0..15; an odd K is padded with code 0
    out    [..., ceil(K / 2)] uint8
    """
    codes = codes.view(torch.uint8) & 15
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, k: int, signed: bool) -> Tensor:
    """The inverse of `pack_nibbles`: [..., k] int8 when signed, else uint8."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :k]
    if not signed:
        return codes.contiguous()
    return ((codes ^ 8).to(torch.int8) - 8).contiguous()


def swizzle_scales(scales: Tensor) -> Tensor:
    """Block scales as Blackwell's tensor cores read them: tiles of 128 rows by 4 columns, 512 bytes each.

    scales  [R, C] of one byte each
    out     [ceil(R / 128) * ceil(C / 4) * 512], tiles row by row, padded with zeros; inside a tile, row r and column c lie
            at (r mod 32) * 16 + (r div 32) * 4 + c
    """
    R, C = scales.shape
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, -C % 4, 0, -R % 128))
    tiles = padded.view(-(-R // 128), 4, 32, -(-C // 4), 4)  # [tile, r div 32, r mod 32, tile, c]
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle_scales`: [rows, columns]."""
    tiles = swizzled.view(torch.uint8).view(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    return (
        tiles.permute(0, 3, 2, 1, 4)
        .reshape(-(-rows // 128) * 128, -1)[:rows, :columns]
        .contiguous()
        .view(swizzled.dtype)
    )
