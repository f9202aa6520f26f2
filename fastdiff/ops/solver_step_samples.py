"""Calls of `solver_step` that tests and benchmarks go through."""

from collections.abc import Iterator

import torch

from fastdiff.ops.solver_step import COEF

_LOW, _HIGH = COEF.index("lo"), COEF.index("hi")
_NOISE = (COEF.index("C0"), COEF.index("C1"))
_ROWS, _LINES = 3, 2


def samples(device: str) -> Iterator[tuple]:
    """Yields argument tuples: every shape class, dtype, stride pattern, operand count and coefficient layout."""
    for seed, options in enumerate(_cases()):
        yield make_call(torch.Generator().manual_seed(seed), device, **options)


def _cases() -> Iterator[dict]:
    # sizes: 1, odd, prime, tail, empty, one dimension
    for shape in (
        (1, 1),
        (1, 4, 2, 2),
        (2, 3, 5, 7),
        (3, 1, 17, 31),
        (2, 4, 8, 16),
        (2, 5),
        (4,),
        (0, 4, 3, 3),
        (2, 3, 0),
    ):
        yield {"shape": shape}
    yield {"shape": (1, 4, 33, 65), "noises": 1}
    # operand counts
    for outputs, slots in ((0, 0), (1, 1), (2, 3), (3, 5), (4, 0), (4, 5)):
        yield {
            "shape": (2, 3, 4, 11),
            "outputs": outputs,
            "slots": slots,
            "aux": outputs % 2 == 1,
            "copies": slots % 3,
        }
    # element types
    for state in (torch.float32, torch.float64):
        for model in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            yield {"shape": (2, 4, 7, 9), "state": state, "model": model, "aux": True, "noises": 2, "clamp": True}
    # strides of the outputs
    for layout in ("channels_last", "transposed", "sliced", "expanded", "uneven"):
        yield {"shape": (2, 4, 6, 10), "layout": layout, "model": torch.float16, "copies": 2}
        yield {"shape": (2, 5, 9, 13), "layout": layout, "source": True}
    # coefficients per channel, per element, per both
    for fields in ((1, 1), ("C", 1), (1, "E"), ("C", "E")):
        yield {"shape": (2, 3, 5, 8), "fields": fields, "clamp": True, "noises": 1, "aux": True}
        yield {"shape": (2, 6), "fields": fields, "state": torch.float64, "layout": "channels_last"}
    # rows of several batches, samples left alone, operands nobody may read, large values
    yield {"shape": (4, 2, 3, 3), "source": True, "skip": True, "outputs": 3}
    yield {"shape": (2, 4, 5, 5), "unread": True, "outputs": 4, "slots": 5, "aux": True}
    yield {"shape": (2, 4, 5, 5), "size": 1e36, "noises": 1}
    yield {"shape": (1, 4, 64, 64), "outputs": 2, "slots": 2}


def make_call(
    generator: torch.Generator,
    device: str,
    *,
    shape: tuple[int, ...],
    state: torch.dtype = torch.float32,
    model: torch.dtype = torch.float32,
    outputs: int = 2,
    slots: int = 2,
    copies: int = 1,
    noises: int = 0,
    layout: str = "contiguous",
    fields: tuple = (),
    aux: bool = False,
    source: bool = False,
    clamp: bool = False,
    skip: bool = False,
    unread: bool = False,
    size: float = 1.0,
) -> tuple:
    """The arguments of one call, made from a few choices."""
    normal = lambda *dims: size * torch.randn(dims, generator=generator, dtype=torch.float64)
    B = shape[0]
    coef = _coefficients(generator, shape, fields, noises, clamp).to(state)
    meta = torch.tensor([[r % (slots + 1) - 1, slots - 1 if r == 1 else -1, r, 5, r + 7, 6] for r in range(_ROWS)])
    rows = torch.randint(0, _ROWS, (_LINES, B), generator=generator)
    if skip:
        rows[:, ::2] = -1
    m = [_strided(normal(B + 2 * source, *shape[1:]).to(model), layout) for _ in range(outputs)]
    history, u = normal(slots, *shape).to(state), normal(*shape).to(state) if aux else None
    if unread:
        for column, operand in (("b1", m[1]), ("S0", history[0]), ("S2", history[2]), ("D", u), ("d", u)):
            coef[:, COEF.index(column)] = 0
            operand.fill_(float("nan"))
    chosen = torch.randint(0, B + 2, (outputs, B), generator=generator, dtype=torch.int32) if source else None
    seed = torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator, dtype=torch.int64)
    tick = torch.tensor([1], dtype=torch.int32)
    model_input = torch.zeros(copies, *shape, dtype=model)
    call = (normal(*shape).to(state), history, model_input, tick, m, chosen, u, coef, meta.int(), rows.int(), seed)
    move = lambda t: None if t is None else [v.to(device) for v in t] if isinstance(t, list) else t.to(device)
    return tuple(move(argument) for argument in call)


def _coefficients(generator, shape, fields, noises, clamp) -> torch.Tensor:
    extent = {"C": shape[1] if len(shape) > 1 else 1, "E": torch.Size(shape[2:]).numel(), 1: 1}
    coef = 0.3 * torch.randn(_ROWS, len(COEF), *[extent[f] for f in fields], generator=generator, dtype=torch.float64)
    coef[:, _LOW], coef[:, _HIGH] = (-0.5, 0.5) if clamp else (-torch.inf, torch.inf)
    for k in _NOISE[noises:]:
        coef[:, k] = 0
    return coef


def _strided(m: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another layout of memory."""
    if m.dim() < 3 or layout == "contiguous":
        return m
    if layout == "channels_last":
        return m.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return m.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.cat([m, m + 1], dim=1)[:, : m.shape[1]]
    if layout == "expanded":
        return m[:, :, :1, :1].expand_as(m)
    return torch.stack([m, m + 1], dim=-2).flatten(-3, -2)[..., ::2, :]  # every other line
