"""Random calls of every op: one function per op makes the arguments of a call whose innermost size is n.

What is random comes from a Draw, which a property test or a seed decides: the property tests, the guard pages and the sanitizers
go through the same calls. A new op needs a function here.
"""

import random
from collections.abc import Callable, Sequence

import torch

from fastdiff.ops import conv2d_samples, linear_int4, packing
from fastdiff.ops.activate import ACTIVATIONS
from fastdiff.ops.attention import PRECISIONS
from fastdiff.ops.geglu import KINDS
from fastdiff.ops.linear_call import ACTIVATIONS as EPILOGUES
from fastdiff.ops.linear_call import PAIRS, columns, quantize_rows
from fastdiff.ops.linear_w8a8 import quantized
from fastdiff.ops.solver_step_samples import make_call

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 67, 130)


class Draw:
    """Chooses by `pick(options)`; numbers come from a generator whose seed is picked first."""

    def __init__(self, pick: Callable[[Sequence], object]):
        self.pick = pick
        self.generator = torch.Generator().manual_seed(pick(range(1000)))

    @classmethod
    def seeded(cls, seed: int) -> "Draw":
        """Choices that follow from a number."""
        return cls(random.Random(seed).choice)

    def one(self, *options):
        return self.pick(options)

    def maybe(self, value):
        return self.pick((None, value))

    def dtype(self) -> torch.dtype:
        return self.pick(FLOATS)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[..., n] whose rows are contiguous and evenly spaced: a slice of wider rows."""
        *lead, n = shape
        left, right = self.one((0, 0), (0, 3), (1, 0), (4, 5))
        return self.normal(*lead, left + n + right, dtype=dtype or self.dtype())[..., left : left + n]

    def lines(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """[..., n] with a contiguous last dimension and any other strides."""
        *lead, n = shape
        order = self.pick([list(range(len(lead))), list(reversed(range(len(lead))))])
        x = self.rows(*[lead[i] for i in order], n, dtype=dtype)
        return x.permute(*[order.index(i) for i in range(len(lead))], len(lead))

    def view(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the middle of a larger buffer: permuted, with steps and offsets, maybe one dimension expanded."""
        dims = range(len(shape))
        order = self.pick([list(dims), list(reversed(dims)), [*dims[1:], *dims[:1]]])
        steps, offsets = [self.one(1, 1, 2, 3) for _ in dims], [self.one(0, 0, 1, 3) for _ in dims]
        flat = self.one(None, *dims)
        sizes = [1 if d == flat else shape[d] for d in dims]
        buffer = self.normal(*[offsets[d] + sizes[d] * steps[d] + 1 for d in order], dtype=dtype)
        buffer = buffer.permute([order.index(d) for d in dims])
        for d in dims:
            buffer = buffer.narrow(d, offsets[d], sizes[d] * steps[d])
            buffer = buffer[(slice(None),) * d + (slice(None, None, steps[d]),)]
        return buffer.expand(shape)

    def table(self, B: int, n: int) -> torch.Tensor | None:
        """[B, n] with strided rows, or None."""
        return self.maybe(self.normal(B, 3 * n, dtype=self.dtype())[:, n : 2 * n])

    def vector(self, n: int) -> torch.Tensor | None:
        return self.maybe(self.normal(n, dtype=self.dtype()))


def copy(d: Draw, n: int) -> tuple:
    shape = (*d.one((), (3,), (2, 19), (2, 1, 5), (0, 3)), n)
    return d.view(*d.one(shape, shape[::-1]), dtype=d.dtype()), d.dtype()


def activate(d: Draw, n: int) -> tuple:
    return d.rows(*_lead(d), n), d.one(*ACTIVATIONS)


def geglu(d: Draw, n: int) -> tuple:
    return d.rows(*_lead(d), 2 * n), d.one(*KINDS)


def quantize_rows_call(d: Draw, n: int) -> tuple:
    return (d.one(1.0, 1e-3, 1e4) * d.rows(*_lead(d), n),)


def quantize_static(d: Draw, n: int) -> tuple:
    x = d.rows(d.one(1, 3), *d.one((), (2,)), n)
    scale = 0.01 + torch.rand(d.one(1, x.shape[0]), generator=d.generator) / 20
    offset = torch.randint(-127, 128, scale.shape, generator=d.generator).float()
    return x, scale, d.maybe(offset), d.one(0, 1, 4, 7)


def resample(d: Draw, n: int) -> tuple:
    return d.normal(*d.one((1, 1, 1), (1, 5, 3), (2, 2, 4), (0, 2, 2)), n, dtype=d.dtype()), d.one(
        "nearest2x", "average2x"
    )


def scale_channels(d: Draw, n: int) -> tuple:
    return d.rows(*_lead(d), n), d.normal(n), d.dtype()


def norm_modulate_int8(d: Draw, n: int) -> tuple:
    B, N = d.one((1, 1), (2, 3), (3, 5), (0, 2), (2, 0))
    x = d.lines(B, N, n, dtype=d.dtype())
    return x, d.one("layer", "rms"), d.vector(n), d.vector(n), 1e-5, d.table(B, n), d.table(B, n)


def norm_modulate(d: Draw, n: int) -> tuple:
    return *norm_modulate_int8(d, n), d.dtype()


def gated_norm_modulate(d: Draw, n: int) -> tuple:
    x, *rest = norm_modulate_int8(d, n)
    return x, d.lines(*x.shape, dtype=d.dtype()), d.table(x.shape[0], n), *rest, d.dtype()


def group_norm(d: Draw, n: int) -> tuple:
    B, C1, C2 = d.one(1, 2) if n else 0, max(n, 1), d.one(0, 5, n)
    image = d.one((1, 1), (3, 5), (4, 2))
    x = d.normal(B, *image, C1, dtype=d.dtype())
    x2 = d.normal(B, *image, C2, dtype=d.dtype()) if C2 else None
    return x, x2, *_after_group_norm(d, B, C1 + C2)


def group_norm_nchw(d: Draw, n: int) -> tuple:
    B, C = d.one(1, 2), d.one(1, 6, 8)
    x = d.normal(B, C, *d.one((n,), (1, n), (3, n)), dtype=d.dtype())
    return x, *_after_group_norm(d, B, C)


def _after_group_norm(d: Draw, B: int, C: int) -> tuple:
    groups = d.one(*[g for g in (1, 2, 3, 4, C) if C % g == 0])
    out = d.one((None, torch.float32), (None, torch.bfloat16), (torch.tensor([0.03]), torch.int8))
    return groups, d.vector(C), d.vector(C), 1e-5, d.one("none", "silu"), d.table(B, C), d.table(B, C), *out


def qk_norm_rope(d: Draw, n: int) -> tuple:
    turned = d.one(True, False)
    D = 2 * min(-(-n // 2), 512) if turned else min(n, 1024)
    B, N, H = d.one((1, 1, 1), (2, 3, 2), (1, 5, 3), (0, 2, 1))
    x, weight, eps = d.lines(B, N, H, D, dtype=d.dtype()), d.vector(D), d.one(None, 1e-6)
    shape = d.one((N, D), (B, N, D))
    angles = (d.rows(*shape), d.rows(*shape)) if turned else (None, None)
    return x, weight, eps, *angles, d.one(True, False), d.dtype()


def linear_attention(d: Draw, n: int) -> tuple:
    D, (B, N, M, H), dtype = min(n, 256), d.one((1, 1, 1, 1), (2, 3, 70, 2), (1, 9, 0, 3), (0, 2, 2, 1)), d.dtype()
    q, k, v = d.lines(B, N, H, D, dtype=dtype), d.lines(B, M, H, D, dtype=dtype), d.lines(B, M, H, D, dtype=dtype)
    return q, k, v, d.one(1e-15, 1e-3)


def depthwise_conv2d(d: Draw, n: int) -> tuple:
    activation = d.one("none", "swiglu")
    C = 2 * max(n, 1) if activation == "swiglu" else max(n, 1)
    x = d.normal(*d.one((1, 1, 1), (2, 3, 2), (1, 2, 67), (0, 2, 3)), C, dtype=d.dtype())
    return x, d.normal(9, C), d.maybe(d.normal(C)), activation, d.dtype()


def join_heads(d: Draw, n: int) -> tuple:
    turned, (B, N, M, H), dtype = d.one(True, False), d.one((1, 1, 2, 1), (2, 3, 1, 2), (1, 0, 3, 1)), d.dtype()
    D = 2 * min(-(-n // 2), 512) if turned else min(n, 1024)
    streams = d.lines(B, N, H, D, dtype=dtype), d.lines(B, M, H, D, dtype=dtype)
    angles = (d.rows(N + M, D), d.rows(N + M, D)) if turned else (None, None)
    return *streams, d.vector(D), d.vector(D), d.one(None, 1e-6), *angles, d.dtype()


def attention(d: Draw, n: int) -> tuple:
    D, M = (n, d.one(1, 7, 65, 131)) if 0 < n <= 300 else (3, n)
    B, N, (H, heads), dtype = d.one(1, 2), d.one(1, 3, 17, 33), d.one((1, 1), (2, 2), (4, 2)), d.dtype()
    q, k, v = (d.lines(B, tokens, h, D, dtype=dtype) for tokens, h in ((N, H), (M, heads), (M, heads)))
    mask = d.one(None, d.normal(B, 1, 1, M) > -1, d.normal(1, H, N, M, dtype=d.dtype()), d.normal(B, 1, N, 1))
    lengths = torch.randint(0, M + 4, (B,), generator=d.generator, dtype=torch.int32)
    return q, k, v, mask, d.maybe(lengths), D**-0.5, d.one(*PRECISIONS)


def conv2d(d: Draw, n: int) -> tuple:
    return conv2d_samples.make_call(_convolution(d, n), d.dtype(), d.one(*FLOATS[:2]), d.one(*range(6)))


def conv2d_w8a8(d: Draw, n: int) -> tuple:
    dtype, out = d.one(*FLOATS, torch.int8), d.one(torch.float32, torch.int8)
    return conv2d_samples.make_int8_call(_convolution(d, n), dtype, out, d.one(True, False), d.one(*range(6)))


def _convolution(d: Draw, n: int) -> tuple:
    """A shape as in conv2d_samples.SHAPES; n is the number of channels, or of columns where it is large."""
    batch, channels, width = (d.one(1, 2) if n else 0), min(max(n, 1), 67), d.one(1, 4, 7)
    if n > 67:
        channels, width = d.one(1, 3), n
    height, padding, upsample = d.one(1, 2, 5), [d.one(0, 1, 2) for _ in range(4)], d.one(1, 1, 2)
    room = min(height * upsample + sum(padding[2:]), width * upsample + sum(padding[:2]))
    kernel, outputs = d.one(*[k for k in (1, 2, 3, 5) if k <= room]), d.one(1, 3, 16, 17, 33)
    return batch, height, width, channels, d.one(0, 0, 5), outputs, kernel, d.one(1, 2), padding, upsample


def linear(d: Draw, n: int) -> tuple:
    x, weight, *rest = _layer(d, n)
    return x, packing.pack(weight.to(d.one(*FLOATS[:2]))), *rest


def linear_w8a16(d: Draw, n: int) -> tuple:
    x, weight, *rest = _layer(d, n)
    return x, *quantized(weight)[:2], *rest


def linear_w8a8(d: Draw, n: int) -> tuple:
    x, weight, *rest, out_dtype = _layer(d, n)
    dynamic, codes = quantize_rows(x, None), d.one(True, False)
    out = d.one((None, out_dtype), (torch.tensor([0.05]), torch.int8))
    if codes:
        x, scale = dynamic[0].to(torch.int8), d.one(dynamic[1][..., 0].contiguous(), torch.tensor([0.02]))
        return x, scale, *quantized(weight), *rest, *out
    return x, d.maybe(torch.tensor([0.02])), *quantized(weight), *rest, *out


def linear_w4a16(d: Draw, n: int) -> tuple:
    group = d.one(8, 32, 64)
    x, weight, out_features, *rest = _layer(d, -(-n // group) * group)
    return x, *linear_int4.quantized_int4(weight, group), out_features, group, *rest


def _layer(d: Draw, K: int) -> tuple:
    """x, weight [N, K], outputs, bias, activation, gate, residual, type of the result."""
    lead, activation, N = d.one((1,), (3,), (2, 17), (40,), (0,)), d.one(*EPILOGUES), d.one(1, 5, 16, 17, 40)
    halves = [(d.normal(N, K) / max(K, 1) ** 0.5, d.normal(N)) for _ in range(2)]
    weight, bias = halves[0]
    if activation in PAIRS:
        weight, bias, N = *(packing.interleave(*pair) for pair in zip(*halves, strict=True)), 2 * N
    width = columns(N, activation)
    gate, residual = d.table(lead[0], width), d.maybe(d.rows(*lead, width))
    return d.rows(*lead, K), weight, N, d.maybe(bias), activation, gate, residual, d.dtype()


def gram(d: Draw, n: int) -> tuple:
    shape = (*d.one((), (2,), (2, 3), (0,)), n)
    return ([d.view(*shape, dtype=d.one(*FLOATS, torch.float64)) for _ in range(d.one(1, 2, 4, 8))],)


def philox_normal(d: Draw, n: int) -> tuple:
    whole = lambda: torch.randint(-(2**31), 2**31 - 1, (rows,), generator=d.generator)
    rows = d.one(1, 2, 3, 0)
    return whole() << 32 | whole(), whole().int(), whole().int(), n


def solver_step(d: Draw, n: int) -> tuple:
    shape, source = (*d.one((1,), (2, 3), (2, 1, 5), (3, 4)), n), d.one(True, False)
    model, outputs = d.one(*FLOATS, torch.float64), d.one(0, 1, 2, 4)
    args = make_call(
        d.generator, "cpu", shape=shape, state=d.one(torch.float32, torch.float64), model=model, outputs=outputs,
        slots=d.one(0, 1, 3, 5), copies=d.one(0, 1, 2), noises=d.one(0, 1, 2), aux=d.one(True, False), source=source,
        clamp=d.one(True, False), skip=d.one(True, False), fields=d.one((), (1, 1), ("C", 1), (1, "E"), ("C", "E")),
    )  # fmt: skip
    views = [d.view(shape[0] + 2 * source, *shape[1:], dtype=model) for _ in range(outputs)]
    return *args[:4], views, *args[5:]


def _lead(d: Draw) -> tuple[int, ...]:
    return d.one((), (1,), (3,), (2, 3), (0,))


CALLS: dict[str, Callable[[Draw, int], tuple]] = {
    "quantize_rows": quantize_rows_call,
    "attention_lse": attention,
    "linear_w4a8": linear_w4a16,
    **{
        f.__name__: f
        for f in (
            *(activate, attention, conv2d, conv2d_w8a8, copy, depthwise_conv2d, gated_norm_modulate, geglu, gram),
            *(group_norm, group_norm_nchw, join_heads, linear, linear_attention, linear_w4a16, linear_w8a16),
            *(linear_w8a8, norm_modulate, norm_modulate_int8, philox_normal, qk_norm_rope, quantize_static),
            *(resample, scale_channels, solver_step),
        )
    },
}
