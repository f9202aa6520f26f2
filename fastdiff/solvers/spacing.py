"""Where the model is called: names for grids of times or of noise levels, and `levels`, which makes them noise levels."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.process import Level, Process, VPDiscrete
from fastdiff.solvers import spacing_grids as grids
from fastdiff.solvers.invariants import check_levels

_POSITIVE = {"rho", "sigma_min", "sigma_max", "a", "b", "shift", "power", "tokens"}


@dataclass(frozen=True)
class Spacing:
    """A grid of `steps` call levels, noise falling: `grid(process, steps, final, **options)` in units of time or of kappa."""

    grid: Callable[..., np.ndarray]
    unit: str = "time"

    def __call__(self, process: Process, steps: int, final: str = "zero", **options) -> np.ndarray:
        """[steps] float64 times of the model calls, falling."""
        values = self.grid(process, steps, final, **options)
        return values if self.unit == "time" else process.time_of_lam(-np.log(values))


def levels(
    process: Process,
    steps: int | None,
    spacing: str | Sequence[float] | np.ndarray = "uniform-lambda",
    final: str = "zero",
    **options,
) -> list[Level]:
    """The noise levels of a run: one per call and the one where it ends, steps + 1 in all.

    steps    model steps; not used (it may be None) where times or sigmas are explicit
    spacing  a key of SPACINGS (which takes the options), or explicit times; a last time at zero noise is the end, not a call
    final    "zero" noise, the process's "t_min", or "given": the last value of the spacing itself (rising values: inversion)

    Raises ValueError for unknown names, fewer than one step, and levels that are not strictly monotonic.
    """
    if final not in ("zero", "t_min", "given"):
        raise ValueError(f"levels: unknown final {final!r}; known are zero, t_min, given")
    if not isinstance(spacing, str):
        spacing, options = "timesteps", {"timesteps": spacing, **options}
        steps = None
    if spacing not in SPACINGS:
        raise ValueError(f"levels: unknown spacing {spacing!r}; known are {', '.join(SPACINGS)}")
    if steps is None and spacing not in ("timesteps", "sigmas"):
        raise ValueError(
            f"levels: spacing {spacing!r} needs a number of steps; only explicit times and sigmas do without"
        )
    if steps is not None and (steps != int(steps) or steps < 1):
        raise ValueError(f"levels: steps must be a positive integer, got {steps!r}")
    lookup = {key: options.pop(key) for key in ("interpolation", "rounded_time") if key in options}
    chosen = SPACINGS[spacing]
    _check_options(spacing, chosen, options)
    values = np.asarray(chosen.grid(process, steps, final, **options), dtype=np.float64)
    found = process.levels(values) if chosen.unit == "time" else levels_of_sigmas(process, values, **lookup)
    if final != "given":
        if len(found) > 1 and found[-1].sigma == 0.0:
            found.pop()
        found.append(process.zero_noise() if final == "zero" else process.levels([process.t_min])[0])
    check_levels(found)
    return found


def _check_options(name: str, spacing: Spacing, options: Mapping[str, object]) -> None:
    """Raises ValueError for an option that the grid does not take, and for a parameter that is not a positive number."""
    if name in ("timesteps", "sigmas"):
        return
    known = {key: p for key, p in inspect.signature(spacing.grid).parameters.items() if p.default is not p.empty}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"levels: spacing {name!r} has no option {key!r}; known are {', '.join(known) or 'none'}")
        if key in _POSITIVE and value is not known[key].default:
            if not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
                raise ValueError(f"levels: {key} of spacing {name!r} must be a positive number, got {value!r}")


def levels_of_sigmas(
    process: Process, sigmas: Sequence[float], interpolation: str = "process", rounded_time: bool = False
) -> list[Level]:
    """Noise levels with exactly these kappa = sigma / alpha (0 gives clean data).

    interpolation  which time the model receives: "process" inverts the process; "log-sigma" interpolates log kappa between
                   the training steps of VPDiscrete, as k-diffusion and diffusers do
    rounded_time   round that time to a training step
    """
    sigmas = np.asarray(sigmas, dtype=np.float64)
    if sigmas.ndim != 1 or sigmas.size < 1 or not np.all(sigmas >= 0.0) or np.isinf(sigmas).any():
        raise ValueError("levels: sigmas must be a vector of finite, non-negative noise levels")
    if interpolation not in ("process", "log-sigma"):
        raise ValueError(f"levels: unknown interpolation {interpolation!r}; known are process, log-sigma")
    if interpolation == "process" and not rounded_time:
        positive = sigmas[sigmas > 0.0]
        made = process.levels(process.time_of_lam(-np.log(positive))) if positive.size else []
        return [*made, *[process.zero_noise()] * (sigmas.size - positive.size)]
    if not isinstance(process, VPDiscrete):
        raise ValueError(
            f"levels: log-sigma interpolation and rounded times need VPDiscrete, not {type(process).__name__}"
        )
    if interpolation == "process":
        t = process.time_of_lam(-np.log(np.maximum(sigmas, 1e-10)))
    else:
        training = np.arange(process.alphas_cumprod.size)
        t = np.interp(np.log(np.maximum(sigmas, 1e-10)), -process.lam(training), training)
    t = np.rint(t) if rounded_time else t
    alpha = 1.0 / np.sqrt(1.0 + sigmas**2)
    return [Level(float(a), float(b), float(b * c), float(a)) for a, b, c in zip(t, alpha, sigmas, strict=True)]


SPACINGS: dict[str, Spacing] = {
    "leading": Spacing(grids.leading),
    "trailing": Spacing(grids.trailing),
    "linspace": Spacing(grids.linspace),
    "uniform": Spacing(grids.uniform),
    "quadratic": Spacing(grids.quadratic),
    "uniform-lambda": Spacing(grids.polyexponential, "sigma"),
    "karras": Spacing(grids.karras, "sigma"),
    "exponential": Spacing(grids.polyexponential, "sigma"),
    "polyexponential": Spacing(grids.polyexponential, "sigma"),
    "beta": Spacing(grids.beta),
    "beta-sigma": Spacing(grids.beta_sigma, "sigma"),
    "ays": Spacing(grids.ays, "sigma"),
    "shift": Spacing(grids.shift),
    "timesteps": Spacing(grids.given("timesteps")),
    "sigmas": Spacing(grids.given("sigmas"), "sigma"),
}
