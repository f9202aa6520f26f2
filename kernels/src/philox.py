"""Philox4x32-10 and Box-Muller for Triton, operation by operation as `fastdiff/ops/philox_normal.py` defines them.

Launch with `enable_fp_fusion=False`: a contracted multiply-add changes the bits. `tl.randn` is not used because its sine
and cosine take a slow path with a 32-byte stack.
"""

import triton
import triton.language as tl

# equal to the constants of the op's reference; tests/test_triton.py compares them
LOG_POLYNOMIAL = tl.constexpr(
    (
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
)
SIN_POLYNOMIAL = tl.constexpr((-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1))
COS_POLYNOMIAL = tl.constexpr((2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2))
ANGLE_UNIT = tl.constexpr(1.5707963267948966 * 2.0**-30)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_STEP_0, KEY_STEP_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@triton.jit
def normal_block(seed, step, stream, first, BLOCK: tl.constexpr):
    """Standard normals of elements first .. first + BLOCK - 1 (first a multiple of 4) as float32 [BLOCK]."""
    block = (first // 4).to(tl.int64) + tl.arange(0, BLOCK // 4)
    zeros = (block * 0).to(tl.uint32)
    c0, c1, c2, c3 = philox(
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        zeros + step.to(tl.uint32),
        zeros + stream.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    z0, z1 = box_muller(c0, c1)
    z2, z3 = box_muller(c2, c3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10 (Salmon et al. 2011, table 2) on uint32 counters."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, MULTIPLIER_0, tl.uint32)), c0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, MULTIPLIER_1, tl.uint32)), c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + KEY_STEP_0, key1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def box_muller(word0, word1):
    """Two normals from two uint32 words."""
    uniform = word0.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt_rn(-2.0 * natural_log(uniform))
    quadrant = word1 >> 30
    angle = ((word1 & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * ANGLE_UNIT
    z = angle * angle
    sine = _horner(SIN_POLYNOMIAL, 3, z) * z * angle + angle
    cosine = _horner(COS_POLYNOMIAL, 3, z) * (z * z) - 0.5 * z + 1.0
    swap = (quadrant & 1) != 0
    first, second = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    # quadrant q turns (cosine, sine) by q * pi/2
    first = tl.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = tl.where(quadrant >= 2, -second, second)
    return radius * first, radius * second


@triton.jit
def natural_log(u):
    """ln(u) for u in (0, 1]."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    e = exponent.to(tl.float32)
    y = _horner(LOG_POLYNOMIAL, 9, f) * f * z + LN2_LOW * e
    y = y - 0.5 * z
    return (f + y) + LN2_HIGH * e


@triton.jit
def _horner(POLYNOMIAL: tl.constexpr, TERMS: tl.constexpr, z):
    y = z * POLYNOMIAL[0] + POLYNOMIAL[1]
    for k in tl.static_range(2, TERMS):
        y = y * z + POLYNOMIAL[k]
    return y
