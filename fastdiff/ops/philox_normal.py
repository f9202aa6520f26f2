"""Standard normal noise that is a function of (seed, stream, step, element) and of nothing else."""

import torch

from fastdiff.ops import memory, native
from fastdiff.ops.registry import op

# Philox4x32-10 (Salmon et al. 2011, table 2)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
# ln(1 + f) = f - f^2 / 2 + f^3 * P(f) for f in [-0.293, 0.414]
LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
# sin(y) = y + y * z * P(z), cos(y) = 1 - z / 2 + z * z * P(z), z = y^2, for |y| <= pi / 4
SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
HALF_PI = 1.5707963267948966
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4


def _check(seed: torch.Tensor, step: torch.Tensor, stream: torch.Tensor, n: int) -> None:
    if seed.dtype != torch.int64 or seed.dim() != 1:
        raise TypeError(f"philox_normal: seed must be int64 [B], got {seed.dtype} {list(seed.shape)}")
    for name, value in (("step", step), ("stream", stream)):
        if value.dtype != torch.int32 or value.shape != seed.shape or value.device != seed.device:
            raise ValueError(
                f"philox_normal: {name} must be int32 {list(seed.shape)} on {seed.device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
    if n < 0:
        raise ValueError(f"philox_normal: n must be >= 0, got {n}")


@op(check=_check)
def philox_normal(seed: torch.Tensor, step: torch.Tensor, stream: torch.Tensor, n: int) -> torch.Tensor:
    """Draws n standard normal numbers per row.

    seed    [B] int64: the key; its 64 bits are used as they are
    step    [B] int32: which step of the trajectory
    stream  [B] int32: which of several independent draws of a step
    n       numbers per row, >= 0
    out     [B, n] float32

    Philox4x32-10 with key = seed and counter = (element // 4, step, stream) gives four 32-bit words for elements
    4k..4k+3; words (0, 1) and (2, 3) each make two normals by Box-Muller. Only correctly rounded float32 additions,
    multiplications and square roots are used, so the bits are equal on every backend. Largest magnitude: 6.77.
    """
    block = torch.arange((n + 3) // 4, device=seed.device, dtype=torch.int64)
    rows = [value.to(torch.int64)[:, None].expand(-1, block.numel()) for value in (step, stream)]
    counter = [(block & _MASK).expand_as(rows[0]), (block >> 32).expand_as(rows[0]), *(row & _MASK for row in rows)]
    words = _philox(counter, seed[:, None] & _MASK, (seed[:, None] >> 32) & _MASK)
    pairs = [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
    return torch.stack(pairs, dim=-1).reshape(seed.numel(), 4 * block.numel())[:, :n].contiguous()


def _philox(counter: list[torch.Tensor], key0: torch.Tensor, key1: torch.Tensor) -> list[torch.Tensor]:
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ key0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ key1,
            p0 & _MASK,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK, (key1 + _KEY_STEPS[1]) & _MASK
    return [c0, c1, c2, c3]


def _box_muller(word0: torch.Tensor, word1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two normals from two 32-bit words (int64 tensors), in float32 with a fixed order of operations."""
    uniform = word0.to(torch.float32) * 2.0**-32 + 2.0**-33  # in [2^-33, 1]
    # torch's float32 square root on the CPU is not correctly rounded (17 % of these inputs, 2.13 with MKL); through
    # float64 it is
    radius = torch.sqrt((-2.0 * _log(uniform)).to(torch.float64)).to(torch.float32)
    quadrant = word1 >> 30
    angle = ((word1 & 0x3FFFFFFF) - 0x20000000).to(torch.float32) * (HALF_PI * 2.0**-30)  # in [-pi/4, pi/4)
    z = angle * angle
    sin = _horner(SIN_POLYNOMIAL, z) * z * angle + angle
    cos = _horner(COS_POLYNOMIAL, z) * (z * z) - 0.5 * z + 1.0
    swap = (quadrant & 1).bool()
    first, second = torch.where(swap, sin, cos), torch.where(swap, cos, sin)
    # quadrant q turns (cos, sin) by q * pi/2
    first = torch.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = torch.where(quadrant >= 2, -second, second)
    return radius * first, radius * second


def _log(u: torch.Tensor) -> torch.Tensor:
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0  # mantissa in [sqrt(1/2), sqrt(2)) minus 1
    z = f * f
    e = exponent.to(torch.float32)
    y = _horner(LOG_POLYNOMIAL, f) * f * z + LN2_LOW * e
    y = y - 0.5 * z
    return (f + y) + LN2_HIGH * e


def _horner(polynomial: tuple[float, ...], z: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(z, polynomial[0])
    for coefficient in polynomial[1:]:
        y = y * z + coefficient
    return y


@philox_normal.variant("cpu", devices=("cpu",), missing=native.cpu_missing)
def _(seed, step, stream, n):
    out = memory.empty((seed.numel(), n), torch.float32)
    seed, step, stream = seed.contiguous(), step.contiguous(), stream.contiguous()
    native.cpu().philox_normal(out.data_ptr(), seed.data_ptr(), step.data_ptr(), stream.data_ptr(), *out.shape)
    return out


@philox_normal.variant("cuda", devices=("cuda",), missing=native.cuda_missing)
def _(seed, step, stream, n):
    out = torch.empty(seed.numel(), n, dtype=torch.float32, device=seed.device)
    seed, step, stream = seed.contiguous(), step.contiguous(), stream.contiguous()
    pointers = [t.data_ptr() for t in (out, seed, step, stream)]
    native.cuda().philox_normal(*pointers, *out.shape, *native.queue(seed.device))
    return out


@philox_normal.variant("triton", devices=("cuda",), missing=native.triton_missing)
def _(seed, step, stream, n):
    from fastdiff.kernels.philox_normal import philox_normal_triton

    out = torch.empty(seed.numel(), n, dtype=torch.float32, device=seed.device)
    philox_normal_triton(out, seed.contiguous(), step.contiguous(), stream.contiguous())
    return out


@philox_normal.sample
def _(device):
    generator = torch.Generator().manual_seed(0)
    for rows, n in ((1, 1), (1, 4), (2, 7), (3, 64), (5, 1023), (2, 4099), (0, 8), (3, 0)):
        seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator, dtype=torch.int64)
        step, stream = torch.randint(0, 2**31 - 1, (2, rows), generator=generator, dtype=torch.int32)
        yield seed.to(device), step.to(device), stream.to(device), n
