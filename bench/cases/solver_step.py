"""The solver update with guidance, against diffusers' schedulers, eager torch, and torch.compile."""

import math
from collections.abc import Callable, Iterator

import torch

from bench.cases import Case
from fastdiff import Sampler, VPDiscrete
from fastdiff.ops.solver_step import COEF, bind
from fastdiff.process import discrete_alphas

SHAPES = ((2, 4, 64, 64), (1, 16, 128, 128), (1, 16, 21, 90, 160))
SOLVERS = {"dpmpp-2m": "DPMSolverMultistepScheduler", "unipc-2": "UniPCMultistepScheduler"}
STEPS, GUIDANCE = 20, 5.0


def cases(device: str, shapes: tuple = (), dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """A whole 20-step loop per call, so that every row of the table is timed; divide by 20 for one step."""
    for shape in shapes or SHAPES:
        for solver, scheduler in SOLVERS.items():
            table = _plan(shape, solver)
            state = math.prod(shape) * STEPS
            traffic = state * (4 * (2 + 2 * table.slots) + 3 * dtype.itemsize)  # two outputs, one model input
            contenders = {
                "fastdiff": _fastdiff(shape, table, device, dtype),
                "torch": _torch(shape, table, device, dtype, False),
            }
            contenders["torch.compile"] = _torch(shape, table, device, dtype, True)
            contenders |= _diffusers(shape, scheduler, device, dtype)
            yield Case(f"{solver} {shape} x{STEPS}", contenders, traffic)


def _plan(shape: tuple, solver: str):
    process = VPDiscrete(alphas_cumprod=discrete_alphas("scaled_linear", 0.00085, 0.012))
    sampler = Sampler(lambda x, t: x, process=process)
    return sampler.plan(shape[0], solver=solver, steps=STEPS, guidance=GUIDANCE)


def _outputs(shape: tuple, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Both branches in one tensor, as pipelines get them."""
    return torch.randn(2 * shape[0], *shape[1:], device=device, dtype=dtype)


def _fastdiff(shape: tuple, plan, device: str, dtype: torch.dtype) -> Callable[[], None]:
    B = shape[0]
    x, y = torch.randn(shape, device=device), _outputs(shape, device, dtype)
    history = torch.zeros(plan.slots, *shape, device=device)
    model_input = torch.empty(1, *shape, device=device, dtype=dtype)
    tick = torch.zeros(1, dtype=torch.int32, device=device)
    on = lambda array, dtype: torch.from_numpy(array).to(device=device, dtype=dtype)
    source = torch.arange(2 * B, dtype=torch.int32, device=device).view(2, B)
    seed = torch.zeros(B, dtype=torch.int64, device=device)
    tables = (on(plan.coef, torch.float32), on(plan.meta, torch.int32), on(plan.rows, torch.int32))
    step = bind(x, history, model_input, tick, source, None, *tables, seed)

    def loop() -> None:
        tick.zero_()
        for _ in range(STEPS):
            step([y, y])

    return loop


def _torch(shape: tuple, plan, device: str, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    """The same rows with torch operations; coefficients as Python numbers, one graph for all rows when compiled."""
    x, y = torch.randn(shape, device=device), _outputs(shape, device, dtype)
    start = [torch.zeros(shape, device=device) for _ in range(plan.slots)]
    names = ("a", "b0", "b1", "A", "B", *(f"S{s}" for s in range(plan.slots)))
    rows = [torch.tensor([plan.coef[r, COEF.index(n)] for n in names], dtype=torch.float32) for r in plan.rows[:, 0]]
    stores = [int(plan.meta[r, 0]) for r in plan.rows[:, 0]]

    def update(x, cond, negative, slots, c):
        h = c[0] * x + c[1] * cond + c[2] * negative
        new = c[3] * x + c[4] * h
        for s, value in enumerate(slots):
            new = new + c[5 + s] * value
        return new, h

    step = torch.compile(update, fullgraph=True, dynamic=False) if compiled else update

    def loop() -> None:
        state, slots = x, list(start)
        cond, negative = y.chunk(2)
        for c, store in zip(rows, stores, strict=True):
            state, h = step(state, cond, negative, slots, c)
            if store >= 0:
                slots[store] = h

    return loop


def _diffusers(shape: tuple, scheduler: str, device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    try:
        import diffusers
    except ImportError:
        return {}
    made = getattr(diffusers, scheduler)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, y = torch.randn(shape, device=device), _outputs(shape, device, dtype)
    made.set_timesteps(STEPS, device=device)

    def loop() -> None:
        made.model_outputs = [None] * made.config.solver_order
        made.lower_order_nums, made._step_index, made.last_sample = 0, None, None
        state = x
        for t in made.timesteps:
            negative, cond = y.chunk(2)
            guided = negative + GUIDANCE * (cond - negative)
            state = made.step(guided, t, made.scale_model_input(state, t), return_dict=False)[0]

    return {"diffusers": loop}
