"""Compiles a scheduler object (set_timesteps, scale_model_input, step) into a SolverTable by one probing run."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.process import Level
from fastdiff.solvers.compat.twin import float64_twin
from fastdiff.solvers.row import STEP_STREAM, Noise, Row, Solver, choose
from fastdiff.solvers.table import SolverTable, assemble

_PROBES = (0.0, 1.0, 3.0, 30.0)  # deviations of the random elements; the large one finds clamps
_DRAWS_PER_CALL = 2
_AFFINE = 1e-5  # relative; a clamp or a quantile is off by far more, a float32 cast inside the scheduler by less
_NEGLIGIBLE = 1e-10  # of a row's largest coefficient, or of the terms whose difference it is
_TRIES = 12  # old symbols whose removal is tried when rows are shortened


@dataclass(frozen=True, eq=False)
class _Response:
    """What a scheduler did, in terms of every state s_k that it was given, every output m_k and every noise z_j.

    weights  [n, 2 n + J]: weight in the result of call i of each s_k, m_k and z_j
    drawn    the call in which each z_j was drawn, and its place there
    c_in     [n]: input scale of each call
    """

    weights: np.ndarray
    drawn: list[tuple[int, int]]
    c_in: np.ndarray


def from_scheduler(
    scheduler: object,
    steps: int | None = None,
    *,
    timestep_options: Mapping[str, object] | None = None,
    step_options: Mapping[str, object] | None = None,
    precision: str = "float64",
) -> SolverTable:
    """Compiles a scheduler that is affine in states, model outputs and noise; the given object is left untouched.

    scheduler         has set_timesteps, timesteps, step and perhaps scale_model_input, as diffusers schedulers do
    steps             first argument of set_timesteps; None where timestep_options carry sigmas or timesteps
    timestep_options  further arguments of set_timesteps (sigmas, mu, ...)
    step_options      further arguments of step (eta, ...)
    precision         "float64": coefficients as its formulas mean them; "stock": as it computes them, in float32 where it does

    The rows act on the scheduler's own state, frame and raw model output; a remembered prediction is whatever mix of state
    and output the scheduler remembers. Raises ValueError with the reason where the scheduler clamps,
    thresholds, adds constants, needs more than five history slots, or fails on the probe.
    """
    name, wide = type(scheduler).__name__, choose("precision", precision, {"float64": True, "stock": False})
    try:
        response, levels = _probe(scheduler, steps, dict(timestep_options or {}), dict(step_options or {}), wide)
    except Exception as error:  # whatever third-party code raises is the reason
        raise ValueError(f"from_scheduler: {name} cannot be compiled: {error}") from error
    tables, reasons = [], []
    for weights in (response.weights, _shortened(response.weights, len(levels) - 1)):
        try:
            tables.append(_table(name, weights, response, levels))
        except ValueError as error:  # too many slots or noise draws in this form
            reasons.append(str(error))
    if not tables:
        raise ValueError(f"from_scheduler: {name} cannot be compiled: {'; '.join(reasons)}")
    return min(tables, key=lambda table: table.slots)


def _table(name: str, weights: np.ndarray, response: _Response, levels: list[Level]) -> SolverTable:
    conversions, rows = _rows(weights, response.drawn, levels)
    solver = Solver(name, lambda levels, process: list(rows), order=0, history="raw", exact=frozenset())
    return assemble(solver, rows, "raw", conversions, response.c_in)


class _Symbols:
    """The probing inputs: symbol k is 1 in element k, 0 elsewhere, and random in the last elements."""

    def __init__(self, calls: int):
        self.calls, self.call = calls, 0
        self.size = (2 + _DRAWS_PER_CALL) * calls + len(_PROBES)
        self.probes = np.zeros((self.size, len(_PROBES)))
        self.drawn: list[tuple[int, int]] = []
        self._random = np.random.default_rng(0)

    def take(self, symbol: int) -> torch.Tensor:
        self.probes[symbol] = self._random.standard_normal(len(_PROBES)) * _PROBES
        row = np.zeros(self.size)
        row[symbol], row[-len(_PROBES) :] = 1.0, self.probes[symbol]
        return torch.from_numpy(row).reshape(1, 1, 1, -1)

    def draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The next noise symbol, for the scheduler's noise source."""
        place = sum(call == self.call for call, _ in self.drawn)
        if place >= _DRAWS_PER_CALL or int(np.prod(shape)) != self.size:
            raise ValueError(f"call {self.call} draws noise {place + 1} times, the last of shape {list(shape)}")
        self.drawn.append((self.call, place))
        return self.take(2 * self.calls + len(self.drawn) - 1).reshape(shape)


def _probe(scheduler, steps, timestep_options: dict, step_options: dict, wide: bool) -> tuple[_Response, list[Level]]:
    """Runs the schedule once on a tensor whose elements carry one basis vector each."""
    symbols: list[_Symbols] = []
    twin = float64_twin(scheduler, lambda shape: symbols[0].draw(shape), wide=wide)
    twin.set_timesteps(*([steps] if steps is not None else []), **timestep_options)
    n, levels = len(twin.timesteps), _levels(twin)
    symbols.append(_Symbols(n))
    size = symbols[0].size
    results, c_in = np.zeros((n, size)), np.ones(n)
    for i, t in enumerate(twin.timesteps):
        symbols[0].call = i
        x, m = symbols[0].take(i), symbols[0].take(n + i)
        if hasattr(twin, "scale_model_input"):
            scaled = twin.scale_model_input(x.clone(), t)
            c_in[i] = float(scaled.reshape(-1)[i])
            _expect_close(scaled, c_in[i] * x, f"the model input of call {i} is not a multiple of the state")
        results[i] = twin.step(m, t, x, **step_options).prev_sample.double().reshape(-1).numpy()
    count = 2 * n + len(symbols[0].drawn)
    basis, wanted = results[:, :count], results[:, :count] @ symbols[0].probes[:count]
    for i in range(n):
        _expect_close(
            results[i, size - len(_PROBES) :],
            wanted[i],
            f"call {i} is not affine (it clips, thresholds or adds constants)",
        )
    return _Response(basis, symbols[0].drawn, c_in), levels


def _expect_close(got, wanted, message: str) -> None:
    got, wanted = (np.asarray(value, dtype=np.float64).reshape(-1) for value in (got, wanted))
    if not np.max(np.abs(got - wanted)) <= _AFFINE * max(np.max(np.abs(wanted)), 1e-30):
        raise ValueError(message)


def _rows(weights: np.ndarray, drawn_in: list, levels: list[Level]) -> tuple[list[tuple], list[Row]]:
    """(conversion of each call's output, rows): each call remembers the one mix of state and output that later rows use."""
    n = len(levels) - 1
    states, outputs, noise = weights[:, :n], weights[:, n : 2 * n], weights[:, 2 * n :]
    mixes = [_mix(states[k + 1 :, k], outputs[k + 1 :, k]) for k in range(n)]
    rows = []
    for i in range(n):
        B = {k: outputs[i, k] / mixes[k][1] for k in range(i + 1)}
        X = {k: states[i, k] - B[k] * mixes[k][0] for k in range(i + 1)}
        A, least = float(X.pop(i)), _NEGLIGIBLE * np.abs(weights[i, : 2 * n]).max()
        drawn = [(drawn_in[j], float(noise[i, j])) for j in np.flatnonzero(noise[i])]
        if len(drawn) > 2:
            raise ValueError(f"call {i} mixes {len(drawn)} noise draws, at most 2 are possible")
        terms = tuple(Noise(scale, call, STEP_STREAM + place) for (call, place), scale in drawn)
        rows.append(Row(levels[i], levels[i + 1], A, _above(B, least), _above(X, least), terms, D=0.0, step=i))
    return [(a, b, 0.0) for a, b in mixes], rows


def _above(terms: dict[int, float], least: float) -> dict[int, float]:
    return {k: float(v) for k, v in terms.items() if abs(v) > least}


def _shortened(weights: np.ndarray, n: int) -> np.ndarray:
    """Rows that say the same with the fewest old calls: the result s_i of row i - 1 may stand for what went into it.

    A scheduler that keeps its corrected state inside (UniPC, SA-Solver) refers to the beginning in every call; subtracting the
    right multiple of row i - 1 and adding it to the current state removes all of that at once.
    """
    short = weights.copy()
    for i in range(n):
        best = _cleaned(weights[i], weights[i])
        if i > 0:
            before = _cleaned(weights[i - 1], weights[i - 1])
            old = [v for v in np.flatnonzero(before) if v not in (i - 1, n + i - 1) and best[v] != 0.0]
            for ratio in {float(weights[i, v] / before[v]) for v in old[:_TRIES]}:
                less = _cleaned(weights[i] - ratio * before, np.abs(weights[i]) + np.abs(ratio * before))
                less[i] += ratio
                if _burden(less, i, n) < _burden(best, i, n):
                    best = less
        short[i] = best
    return short


def _burden(row: np.ndarray, i: int, n: int) -> int:
    """How many old symbols a row reads."""
    used = row != 0.0
    return int(used[:i].sum() + used[n : n + i].sum() + used[2 * n :].sum())


def _cleaned(row: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Without what is rounding error: relative to the terms it came from, and to the largest."""
    return np.where(np.abs(row) > np.maximum(_NEGLIGIBLE * np.abs(scale), 1e-14 * np.abs(scale).max()), row, 0.0)


def _mix(states: np.ndarray, outputs: np.ndarray) -> tuple[float, float]:
    """(a, b) with a s + b m what later rows read, where they all read the same mix; else the raw output (0, 1)."""
    if not outputs.any():
        return 0.0, 1.0
    _, sizes, directions = np.linalg.svd(np.stack([states, outputs], axis=1), full_matrices=False)
    if len(sizes) > 1 and sizes[1] > 1e-7 * sizes[0]:
        return 0.0, 1.0
    a, b = directions[0]
    return float(a), float(b)


def _levels(twin: object) -> list[Level]:
    """The noise levels, as far as the scheduler says them: add_noise or scale_noise of unit data and unit noise."""
    times = [float(t) for t in twin.timesteps]
    levels = [Level(t, *_mixture(copy.copy(twin), twin.timesteps[i : i + 1]), time=t) for i, t in enumerate(times)]
    start = float(getattr(twin, "init_noise_sigma", levels[0].sigma))
    levels[0] = Level(times[0], levels[0].alpha, start, time=times[0])
    return [*levels, Level(0.0, 1.0, 0.0, 0.0)]


def _mixture(twin: object, t: torch.Tensor) -> tuple[float, float]:
    """(alpha, sigma) at a timestep; (1, 1) where the scheduler does not say. The call may leave marks on `twin`."""
    add = getattr(twin, "add_noise", None)
    arguments = lambda data, noise: (data, noise, t)
    if add is None:
        add, arguments = getattr(twin, "scale_noise", None), lambda data, noise: (data, t, noise)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    try:
        return float(add(*arguments(one, zero))), float(add(*arguments(zero, one)))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return 1.0, 1.0
