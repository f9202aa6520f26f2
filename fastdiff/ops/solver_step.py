"""The update of one sampling step for every solver: a linear combination whose coefficients are rows of a table."""

from collections.abc import Callable

import torch

from fastdiff.ops import native
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.registry import op
from fastdiff.ops.strides import evenly_strided, sizes, strides

MAX_OUTPUTS, MAX_SLOTS = 4, 5
# columns of `coef`; the first two groups make the prediction h, the others the next state
COEF = (
    *("a", "b0", "b1", "b2", "b3", "d", "lo", "hi"),
    *("A", "B", "R", "S0", "S1", "S2", "S3", "S4", "C0", "C1", "D", "E", "c_in"),
)
META = ("slot_h", "slot_x", "step0", "stream0", "step1", "stream1")  # columns of `meta`
_STATE_TYPES = (torch.float32, torch.float64)
_MODEL_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check(x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed) -> None:
    """Raises TypeError or ValueError, naming the argument, before any work."""
    B, shape = x.shape[0] if x.dim() else 0, x.shape[1:]
    _expect(
        "x", x.dim() >= 1 and x.is_contiguous(), "contiguous [B, ...]", f"{list(x.shape)} with strides {x.stride()}"
    )
    _expect("x", x.dtype in _STATE_TYPES, "float32 or float64", x.dtype, TypeError)
    _expect(
        "history",
        history.shape[1:] == x.shape and history.shape[0] <= MAX_SLOTS,
        f"[S <= 5, *{list(x.shape)}]",
        list(history.shape),
    )
    _expect(
        "history",
        history.is_contiguous() and history.dtype == x.dtype,
        f"contiguous {x.dtype}",
        history.dtype,
        TypeError,
    )
    _expect("model_input", model_input.shape[1:] == x.shape, f"[G, *{list(x.shape)}]", list(model_input.shape))
    _expect(
        "model_input",
        model_input.is_contiguous() and model_input.dtype in _MODEL_TYPES,
        "contiguous floats",
        model_input.dtype,
        TypeError,
    )
    _expect("tick", tick.dtype == torch.int32 and tick.shape == (1,), "int32 [1]", f"{tick.dtype} {list(tick.shape)}")
    _expect("outputs", len(outputs) <= MAX_OUTPUTS, "at most 4 tensors", len(outputs))
    for m in outputs:
        rows_ok = m.dim() == x.dim() and (source is not None or m.shape[0] == B)
        _expect("outputs", rows_ok and m.shape[1:] == shape, f"[B or M, *{list(shape)}]", list(m.shape))
        _expect("outputs", m.dtype in _MODEL_TYPES, "floats", m.dtype, TypeError)
    if source is not None:
        _expect(
            "source",
            source.dtype == torch.int32 and source.is_contiguous() and source.shape == (len(outputs), B),
            f"int32 [{len(outputs)}, {B}]",
            f"{source.dtype} {list(source.shape)}",
        )
    if aux is not None:
        _expect(
            "aux",
            aux.shape == x.shape and aux.dtype == x.dtype and aux.is_contiguous(),
            f"contiguous {x.dtype} {list(x.shape)}",
            f"{aux.dtype} {list(aux.shape)}",
        )
    C, E = sizes(x)[1:]
    field = coef.dim() == 4 and coef.shape[2] in (1, C) and coef.shape[3] in (1, E)
    _expect(
        "coef",
        coef.shape[1:2] == (len(COEF),) and (coef.dim() == 2 or field),
        f"[R, {len(COEF)}] or [R, {len(COEF)}, 1 or {C}, 1 or {E}]",
        list(coef.shape),
    )
    _expect("coef", coef.dtype == x.dtype, x.dtype, coef.dtype, TypeError)
    _expect(
        "meta",
        meta.dtype == torch.int32 and meta.is_contiguous() and meta.shape == (coef.shape[0], len(META)),
        f"contiguous int32 [{coef.shape[0]}, {len(META)}]",
        f"{meta.dtype} {list(meta.shape)}",
    )
    _expect(
        "rows",
        rows.dtype == torch.int32 and rows.is_contiguous() and rows.dim() == 2 and rows.shape[1] == B,
        f"contiguous int32 [T, {B}]",
        f"{rows.dtype} {list(rows.shape)}",
    )
    _expect(
        "seed",
        seed.dtype == torch.int64 and seed.is_contiguous() and seed.shape == (B,),
        f"contiguous int64 [{B}]",
        f"{seed.dtype} {list(seed.shape)}",
    )
    others = (
        history,
        model_input,
        tick,
        *outputs,
        coef,
        meta,
        rows,
        seed,
        *(t for t in (source, aux) if t is not None),
    )
    if any(t.device != x.device for t in others):
        raise ValueError(f"solver_step: all tensors must be on {x.device}; move the others there")


def _expect(name: str, ok: bool, expected, got, error: type = ValueError) -> None:
    if not ok:
        raise error(f"solver_step: {name} must be {expected}, got {got}")


@op(mutates=("x", "history", "model_input", "tick"), check=check)
def solver_step(
    x: torch.Tensor,
    history: torch.Tensor,
    model_input: torch.Tensor,
    tick: torch.Tensor,
    outputs: list[torch.Tensor],
    source: torch.Tensor | None,
    aux: torch.Tensor | None,
    coef: torch.Tensor,
    meta: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Applies one row of a solver table to every sample, in place, in one pass over memory.

    x            [B, C, ...] float32 or float64: the state; overwritten
    history      [S, B, C, ...] dtype of x, S <= 5: slots with earlier predictions or states; overwritten
    model_input  [G, B, C, ...] any float: receives c_in * x' once per copy (G may be 0), unless c_in is 0
    tick         [1] int32: the current line of `rows`; incremented at the end
    outputs      up to 4 x [M, C, ...] any float, any strides: raw model outputs m_j
    source       [J, B] int32: sample b reads outputs[j][source[j, b]]; None means row b
    aux          [B, C, ...] dtype of x, or None: a second known endpoint u (zero coefficients when None)
    coef         [R, 21] or [R, 21, 1 or C, 1 or E] dtype of x, any strides (E = elements per channel); columns COEF
    meta         [R, 6] int32; columns META. Slots are -1 for "do not store"
    rows         [T, B] int32: the table row of each sample at each tick; -1 leaves the sample untouched
    seed         [B] int64: noise key of each sample

        raw = a x + sum_j b_j m_j + d u                                h = clamp(raw, lo, hi)
        x'  = A x + B h + R raw + sum_s S_s history[s] + C0 z(step0, stream0) + C1 z(step1, stream1) + D u + E
        history[slot_x] = x;  history[slot_h] = h;  x = x';  model_input[g] = c_in x'

    z is `philox_normal` of (seed, step, stream). Everything is computed in the dtype of x, in the order written. An operand
    whose coefficient is exactly zero for the whole sample is not read, so it may be uninitialised.
    """
    new_x, new_history, new_input = x.clone(), history.clone(), model_input.clone()
    for b in range(x.shape[0]):
        r = int(rows[int(tick), b])
        if r < 0:
            continue
        k = dict(zip(COEF, _fields(coef[r], x), strict=True))
        slot_h, slot_x, step0, stream0, step1, stream1 = meta[r].tolist()
        m = [y[b if source is None else int(source[j, b])].to(x.dtype) for j, y in enumerate(outputs)]
        u = None if aux is None else aux[b]
        raw = _combine(x[b], [(k["a"], x[b]), *((k[f"b{j}"], m[j]) for j in range(len(m))), (k["d"], u)])
        h = torch.minimum(torch.maximum(raw, k["lo"]), k["hi"])
        slots = [(k[f"S{s}"], history[s, b]) for s in range(history.shape[0])]
        noise = [
            (k[c], _noise(x[b], seed[b], *at, k[c])) for c, at in (("C0", (step0, stream0)), ("C1", (step1, stream1)))
        ]
        one = torch.ones_like(x[b])
        new_x[b] = _combine(
            x[b], [(k["A"], x[b]), (k["B"], h), (k["R"], raw), *slots, *noise, (k["D"], u), (k["E"], one)]
        )
        if slot_x >= 0:
            new_history[slot_x, b] = x[b]
        if slot_h >= 0:
            new_history[slot_h, b] = h
        if bool((k["c_in"] != 0).any()):
            new_input[:, b] = (k["c_in"] * new_x[b]).to(model_input.dtype)
    return new_x, new_history, new_input, tick + 1


def _fields(coef: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    """One row of coefficients, each expanded to the shape of a sample."""
    C, E = sizes(x)[1:]
    fields = coef.reshape(len(COEF), *(coef.shape[1:] or (1, 1))).expand(-1, C, E)
    return list(fields.reshape(len(COEF), *x.shape[1:]))


def _combine(like: torch.Tensor, terms: list) -> torch.Tensor:
    total = torch.zeros_like(like)
    for coefficient, value in terms:
        if value is not None and bool((coefficient != 0).any()):
            total = total + coefficient * value
    return total


def _noise(like: torch.Tensor, seed: torch.Tensor, step: int, stream: int, coefficient: torch.Tensor):
    if not bool((coefficient != 0).any()):
        return None
    key = [torch.tensor([value], dtype=torch.int32, device=like.device) for value in (step, stream)]
    return philox_normal.reference(seed.reshape(1), *key, like.numel()).reshape(like.shape).to(like.dtype)


@solver_step.variant("cpu", devices=("cpu",), missing=native.cpu_missing)
def _(x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed):
    _Native(x, history, model_input, tick, source, aux, coef, meta, rows, seed)(outputs)


def _refuse_cuda(x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed) -> str | None:
    if x.numel() and x[0].numel() >= 2**31 - 4096:
        return f"a sample must have fewer than 2^31 elements on a GPU, got {x[0].numel()}"
    return None


def _refuse_triton(x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed) -> str | None:
    if rows.shape[0] >= 1 << 17:
        return f"rows must have fewer than {1 << 17} lines in Triton, got {rows.shape[0]}; split the table"
    return _refuse_cuda(x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed)


@solver_step.variant("cuda", devices=("cuda",), missing=native.cuda_missing, refuse=_refuse_cuda)
def _(x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed):
    _Cuda(x, history, model_input, tick, source, aux, coef, meta, rows, seed)(outputs)


@solver_step.variant("triton", devices=("cuda",), missing=native.triton_missing, refuse=_refuse_triton)
def _(x, history, model_input, tick, outputs, source, aux, coef, meta, rows, seed):
    from fastdiff.kernels.solver_step import solver_step_triton

    even = [evenly_strided(m) for m in outputs]
    views, strides = [m for m, _ in even], [stride for _, stride in even]
    solver_step_triton(x, history, model_input, tick, views, strides, source, aux, coef, meta, rows, seed)


def bind(x, history, model_input, tick, source, aux, coef, meta, rows, seed) -> Callable[[list[torch.Tensor]], None]:
    """Fixes everything but the model's outputs: returns `step(outputs)`, which does what `solver_step` does.

    Arguments are checked and the variant is chosen here, once; a call only compares the outputs with those of the call
    before. The tensors are kept alive, and must keep their shapes and storage.
    """
    outputs = [x] * (0 if source is None else source.shape[0])  # stand-ins of the right shape
    fixed = (x, history, model_input, tick, source, aux, coef, meta, rows, seed)
    check(*fixed[:4], outputs, *fixed[4:])
    run = solver_step.pick(*fixed[:4], outputs, *fixed[4:])
    compiled = {"cpu": _Native, "cuda": _Cuda}
    return compiled[run.name](*fixed) if run.name in compiled else _Generic(run.run, fixed)


def _coef_strides(coef: torch.Tensor) -> list[int]:
    """Strides of row, column, channel and element: 0 where all share one coefficient."""
    per_sample = [0 if n == 1 else s for n, s in zip(coef.shape[2:], coef.stride()[2:], strict=True)]
    return [*coef.stride()[:2], *per_sample, 0, 0][:4]


class _Generic:
    """A bound step on any variant."""

    def __init__(self, run: Callable, fixed: tuple):
        self.run, self.fixed, self.layout = run, fixed, None

    def __call__(self, outputs: list[torch.Tensor]) -> None:
        layout = [(m.dtype, m.device, m.shape, m.stride()) for m in outputs]
        if layout != self.layout:
            check(*self.fixed[:4], outputs, *self.fixed[4:])
            self.layout = layout
        self.run(*self.fixed[:4], outputs, *self.fixed[4:])


class _Native:
    """A bound step on the C++ kernel. About 1 us a call over the kernel itself."""

    def __init__(self, x, history, model_input, tick, source, aux, coef, meta, rows, seed):
        self.fixed = (x, history, model_input, tick, source, aux, coef, meta, rows, seed)
        address = lambda t: 0 if t is None else t.data_ptr()
        self.step = native.cpu().SolverStep(
            address(source),
            [address(t) for t in (x, history, model_input, tick, aux, coef, meta, rows, seed)],
            [native.TYPE_CODES[x.dtype], native.TYPE_CODES[model_input.dtype]],
            [*sizes(x), history.shape[0], model_input.shape[0], rows.shape[0], coef.shape[0]],
            _coef_strides(coef),
        )
        self.run = self.step.run

    def __call__(self, outputs: list[torch.Tensor]) -> None:
        if self.run(outputs):
            return
        # they look different from the last ones, or they are copied at every step because of their strides
        check(*self.fixed[:4], outputs, *self.fixed[4:])
        outputs = [evenly_strided(m)[0] for m in outputs]
        if not self.run(outputs):
            kinds = [(native.TYPE_CODES[m.dtype], m.shape[0], strides(m)) for m in outputs]
            self.step.expect(outputs, kinds)
            self.run(outputs)


class _Cuda:
    """A bound step on the CUDA kernel. Its blocks count themselves in a ticket that no other step shares."""

    def __init__(self, x, history, model_input, tick, source, aux, coef, meta, rows, seed):
        self.fixed = (x, history, model_input, tick, source, aux, coef, meta, rows, seed)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=x.device)
        self.layout, self.even = None, True
        address = lambda t: 0 if t is None else t.data_ptr()
        tensors = (x, history, model_input, tick, self.ticket, aux, coef, meta, rows, seed, source)
        self.step = native.cuda().SolverStep(
            [address(t) for t in tensors],
            [native.TYPE_CODES[x.dtype], native.TYPE_CODES[model_input.dtype]],
            [*sizes(x), history.shape[0], model_input.shape[0], rows.shape[0], coef.shape[0]],
            _coef_strides(coef),
        )

    def __call__(self, outputs: list[torch.Tensor]) -> None:
        layout = [(m.dtype, m.device, m.shape, m.stride()) for m in outputs]
        if layout != self.layout:
            check(*self.fixed[:4], outputs, *self.fixed[4:])
            even = [evenly_strided(m) for m in outputs]
            self.step.expect([(native.TYPE_CODES[m.dtype], m.shape[0], own) for m, own in even])
            self.layout, self.even = layout, all(v is m for (v, _), m in zip(even, outputs, strict=True))
        if not self.even:
            outputs = [evenly_strided(m)[0] for m in outputs]
        self.step.run([m.data_ptr() for m in outputs], *native.queue(self.fixed[0].device))


@solver_step.sample
def _(device):
    from fastdiff.ops.solver_step_samples import samples

    yield from samples(device)
