"""Sampler: one fixed-step loop for every solver, denoiser and state."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastdiff import loop
from fastdiff.arguments import RUN_SETTINGS, Arguments, row_settings, start
from fastdiff.conditioning import Conditioning
from fastdiff.initial import initial_leaves
from fastdiff.options import RunOptions, check_model_dtype
from fastdiff.plan import Plan, make_plan
from fastdiff.process import PREDICTIONS, Process, VPDiscrete

State = torch.Tensor | dict | list | tuple  # a tensor or a pytree of tensors that share their first dimension


@dataclass(frozen=True, eq=False)
class Step:
    """What `Sampler.step` yields after every model call.

    tick   index of the call, counted from 0
    x      the state after it (a copy)
    done   [B] bool: samples that have finished
    """

    tick: int
    x: State
    done: torch.Tensor


class Cancelled(RuntimeError):
    """Raised by `Sampler.sample` when its `cancel` event is set; `step` is the last finished step."""

    def __init__(self, step: Step | None):
        super().__init__(
            "sampling was cancelled" + (f" after call {step.tick + 1}" if step else " before the first call")
        )
        self.step = step


class Sampler:
    """Samples from a denoiser with any solver; every sample of a batch may have its own.

    net         called as net(x, t, **cond) with x [M, ...], t [M] float32 and conditioning of M rows; returns a tensor
                (or pytree) like x. Rows of different samples and branches are mixed in one call.
    prediction  what net returns: a key of `fastdiff.process.PREDICTIONS` or a mix (p, q, r): p x0 + q noise + r x
    process     the noise process; VPDiscrete() (linear betas, 1000 steps) when None
    micro_batch rows per call of net; None means all at once on a GPU, and on a CPU equal parts of at most 32. With 1 the
                result of a sample does not depend on its batch even where the network's own kernels do.
    model_dtype dtype of net's input; that of its first floating parameter when None

    The state is float32 (or float64), whatever the model's dtype. A Sampler holds no running state: it may serve several
    threads if its net may.
    """

    def __init__(
        self,
        net: Callable[..., State],
        *,
        prediction: str | tuple[float, float, float] = "noise",
        process: Process | None = None,
        micro_batch: int | None = None,
        model_dtype: torch.dtype | None = None,
    ):
        if not callable(net):
            raise TypeError(f"Sampler: net must be callable as net(x, t, **cond), got {type(net).__name__}")
        if prediction not in PREDICTIONS if isinstance(prediction, str) else not _is_mix(prediction):
            known = f"known are {', '.join(PREDICTIONS)} and mixes (p, q, r)"
            raise ValueError(f"Sampler: unknown prediction {prediction!r}; {known}")
        if process is not None and not isinstance(process, Process):
            raise TypeError(f"Sampler: process must be a fastdiff.Process, as fastdiff.VPLinear(), got {process!r}")
        if micro_batch is not None and not (isinstance(micro_batch, int) and micro_batch >= 1):
            raise ValueError(f"Sampler: micro_batch must be an integer >= 1 or None, got {micro_batch!r}")
        self.net, self.prediction, self.micro_batch = net, prediction, micro_batch
        self.process = VPDiscrete() if process is None else process
        self.model_dtype = check_model_dtype(model_dtype)

    def plan(self, batch: int, **settings) -> Plan:
        """Compiles what `sample` would run, for `batch` samples.

        Settings are the fields of RowSettings; each is one value for all samples or a list with one per sample.
        Raises ValueError for unknown solvers (listing the keys), bad values and lists of the wrong length.
        """
        return make_plan(row_settings(batch, settings), self.process, self.prediction)

    def sample(
        self,
        shape: Sequence[int] | None = None,
        *,
        x: State | None = None,
        cond: Mapping | None = None,
        negative: Mapping | None = None,
        seed: int | Sequence[int] = 0,
        progress: bool = False,
        cancel: threading.Event | None = None,
        **settings,
    ) -> State:
        """Samples and returns the final state.

        shape     [B, ...] of the state; or give `x`
        x         the initial state (tensor or pytree, first dimension B), at the plan's first noise level
        cond      keyword arguments of net for the conditional branch: tensors with first dimension B, or other values
        negative  the same for the negative branch; needed where guidance is not 1
        seed      one seed per sample, or an integer s: sample b then has seed s + b
        progress  show a progress bar
        cancel    when set, raises Cancelled (with the last step) before the next call

        Further settings: those of `step` (aux, hooks, device, dtype, guard) and of `plan` (solver, compat, steps, guidance,
        spacing, final, clamp), each one value or one per sample. The same seed gives the same noise whatever the batch, the
        device and the thread count. B = 0 returns an empty state. Non-finite values raise NonFiniteError, naming the step.
        """
        if cancel is not None and not hasattr(cancel, "is_set"):
            raise TypeError(f"cancel: a threading.Event or None expected, got {cancel!r}")
        run = self._begin(shape, x, cond, negative, seed, settings)
        bar = loop.progress_bar(run.carry.plan.ticks, progress)
        last = None
        with torch.no_grad(), bar:
            for tick in range(run.carry.plan.ticks):
                if cancel is not None and cancel.is_set():
                    raise Cancelled(last)
                run.advance()
                if cancel is not None:
                    last = _snapshot(run, tick)
                bar.update(1)
            run.check_finite()
        return run.state()

    def step(
        self,
        shape: Sequence[int] | None = None,
        *,
        x: State | None = None,
        cond: Mapping | None = None,
        negative: Mapping | None = None,
        seed: int | Sequence[int] = 0,
        **settings,
    ) -> Iterator[Step]:
        """Yields a Step after every model call; arguments as in `sample`. Closing the generator stops cleanly.

        aux     the known endpoint u of processes with a mean, like x
        hooks   `fastdiff.carry.Hook` objects, called in order
        device  where to sample; that of x or of net's parameters when None
        dtype   float32 or float64 of the state
        guard   check for NaN and Inf (once, at the end; the error names the step)
        graph   on a GPU, capture one step as a CUDA graph and replay it (the network must be capturable)
        """
        run = self._begin(shape, x, cond, negative, seed, settings)
        for tick in range(run.carry.plan.ticks):
            with torch.no_grad():
                run.advance()
            yield _snapshot(run, tick)
        run.check_finite()

    def initial_state(self, shape: Sequence[int], plan: Plan, seed: int | Sequence[int], device="cpu") -> torch.Tensor:
        """The noise that `sample` starts from, [B, ...] float32 at the plan's first level."""
        begin = start(shape, None, seed, torch.device(device))
        return initial_leaves(begin, [None], plan, torch.float32, torch.float32)[0].x

    def arguments(self, shape, x, cond, negative, seed, settings: Mapping) -> Arguments:
        """The arguments of `sample`, checked and compiled; raises before any work."""
        settings = dict(settings)
        own = {name: settings.pop(name) for name in RUN_SETTINGS if name in settings}
        options = RunOptions(**own, micro_batch=self.micro_batch, model_dtype=self.model_dtype)
        begin = start(shape, x, seed, options.resolve_device(self.net, x))
        batch = begin.seed.numel()
        plan = self.plan(batch, **settings)
        conditioning = Conditioning.check(cond, negative, batch, plan, begin.seed.device)
        return Arguments(plan, begin, conditioning, options)

    def _begin(self, *arguments) -> loop.Run:
        given = self.arguments(*arguments)
        return loop.Run.begin(self.net, given.plan, given.start, given.conditioning, given.options)


def _is_mix(prediction: object) -> bool:
    return (
        isinstance(prediction, (tuple, list))
        and len(prediction) == 3
        and all(isinstance(k, (int, float)) and math.isfinite(k) for k in prediction)
    )


def _snapshot(run: loop.Run, tick: int) -> Step:
    return Step(tick, run.state(copy=True), torch.from_numpy(run.carry.plan.finished(tick)))
