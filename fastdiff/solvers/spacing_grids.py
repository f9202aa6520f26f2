"""Grids of call times or noise levels: each is a function (process, steps, final, **options) -> [steps] falling values.

Those in `SPACINGS` with unit "sigma" give kappa = sigma / alpha, the others times.
"""

import numpy as np

from fastdiff.process import Flow, Process, VPDiscrete
from fastdiff.solvers.spacing_tables import AYS, beta_quantile

_NO_SIGNAL = 1e8  # kappa beyond which alpha is a rounding error


def sigma_range(process: Process) -> tuple[float, float]:
    """kappa at t_min and at t_max. A process without signal at t_max starts where kappa is 1 / kappa(t_min)."""
    low, high = (level.kappa for level in process.levels([process.t_min, process.t_max]))
    if low == 0.0:
        raise ValueError(
            f"levels: {type(process).__name__} has no noise at t_min; use a spacing in time or raise t_min"
        )
    return low, high if high < _NO_SIGNAL else 1.0 / low


def _training_steps(process: Process) -> int:
    if not isinstance(process, VPDiscrete):
        raise ValueError(
            f"levels: this spacing counts training steps of VPDiscrete, not {type(process).__name__}; use uniform"
        )
    return process.alphas_cumprod.size


def leading(process: Process, steps: int, final: str, offset: int = 0, skip_last: bool = False) -> np.ndarray:
    """Multiples of T // n, plus `offset`. `skip_last` lays n + 1 points and drops the last (DPM-Solver's schedulers)."""
    ratio = _check_count(process, steps) // (steps + skip_last)
    return np.arange(steps + skip_last)[::-1][:steps] * float(ratio) + offset


def trailing(process: Process, steps: int, final: str) -> np.ndarray:
    """T, T - T / n, ... rounded, minus one: the first call is at the noisiest training step."""
    T = _check_count(process, steps)
    return np.rint(T - np.arange(steps) * (T / steps)) - 1.0


def linspace(process: Process, steps: int, final: str, rounded: bool = True, skip_last: bool = False) -> np.ndarray:
    """Equally spaced from T - 1 to 0 inclusive. `skip_last` lays n + 1 points and drops the last (DPM-Solver's schedulers)."""
    t = np.linspace(0.0, _check_count(process, steps) - 1.0, steps + skip_last)[::-1][:steps]
    return np.rint(t) if rounded else t


def _check_count(process: Process, steps: int) -> int:
    T = _training_steps(process)
    if steps > T:
        raise ValueError(f"levels: at most {T} steps, the number of training steps, got {steps}")
    return T


def uniform(process: Process, steps: int, final: str, power: float = 1.0) -> np.ndarray:
    """Linear in t^(1/power) from t_max; the end (zero, or t_min) is the next point of the same grid."""
    first, last = process.t_max ** (1.0 / power), (0.0 if final == "zero" else process.t_min) ** (1.0 / power)
    return (first + (last - first) * np.arange(steps) / steps) ** power


def quadratic(process: Process, steps: int, final: str) -> np.ndarray:
    """Linear in the square root of t."""
    return uniform(process, steps, final, power=2.0)


def karras(
    process: Process,
    steps: int,
    final: str,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> np.ndarray:
    """Linear in kappa^(1/rho) (Karras et al. 2022, eq. 5). The last call is at sigma_min, unless the run ends there."""
    low, high = _range(process, sigma_min, sigma_max)
    return (high ** (1 / rho) + _ramp(steps, final) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def polyexponential(
    process: Process,
    steps: int,
    final: str,
    rho: float = 1.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> np.ndarray:
    """log kappa falls as (1 - i/n)^rho from log sigma_max to log sigma_min."""
    low, high = _range(process, sigma_min, sigma_max)
    return low * (high / low) ** ((1.0 - _ramp(steps, final)) ** rho)


def beta(process: Process, steps: int, final: str, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Quantiles of the beta distribution in time (Lee et al. 2024): more calls at both ends."""
    first, last = process.t_max, 0.0 if final == "zero" else process.t_min
    return last + beta_quantile(1.0 - np.arange(steps) / steps, a, b) * (first - last)


def beta_sigma(process: Process, steps: int, final: str, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Quantiles of the beta distribution between kappa(t_min) and kappa(t_max), as in diffusers."""
    low, high = sigma_range(process)
    return low + beta_quantile(1.0 - _ramp(steps, final), a, b) * (high - low)


def ays(process: Process, steps: int, final: str, table: str = "sd1") -> np.ndarray:
    """Align Your Steps (Sabour et al. 2024): a published table, log-linearly interpolated; its last node becomes the end."""
    if table not in AYS:
        raise ValueError(f"levels: unknown table {table!r} of ays; known are {', '.join(AYS)}")
    nodes = np.log(AYS[table])
    return np.exp(np.interp(np.linspace(0.0, 1.0, steps + 1), np.linspace(0.0, 1.0, nodes.size), nodes))[:-1]


def shift(
    process: Process,
    steps: int,
    final: str,
    shift: float = 3.0,
    tokens: int | None = None,
    base: tuple[int, float] = (256, 0.5),
    top: tuple[int, float] = (4096, 1.15),
) -> np.ndarray:
    """Resolution shift of rectified flow, t' = s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23).

    tokens  image tokens: s = exp(mu) with mu linear from `base` to `top` (tokens, mu), instead of the static shift
    """
    if not isinstance(process, Flow):
        raise ValueError(
            f"levels: shift is defined for Flow, not {type(process).__name__}; use uniform or uniform-lambda"
        )
    if tokens is not None:
        slope = (top[1] - base[1]) / (top[0] - base[0])
        shift = float(np.exp(base[1] + slope * (tokens - base[0])))
    t = uniform(process, steps, "zero")
    return shift * t / (1.0 + (shift - 1.0) * t)


def _range(process: Process, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    if sigma_min is not None and sigma_max is not None:
        return sigma_min, sigma_max
    low, high = sigma_range(process)
    return low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max


def _ramp(steps: int, final: str) -> np.ndarray:
    """0 to 1 inclusive for runs to zero noise; runs to t_min have their end as the last point."""
    return np.arange(steps) / max(steps - (final == "zero"), 1)


def given(name: str):
    def grid(process: Process, steps: int | None, final: str, **options) -> np.ndarray:
        if set(options) != {name}:
            raise ValueError(
                f"levels: spacing {name!r} takes the option {name}=[...] and no other, got {sorted(options)}"
            )
        try:
            values = np.asarray(options[name], dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if values.ndim != 1 or values.size < 1:
            raise ValueError(f"levels: {name} must be a vector of at least one entry")
        if np.isinf(values).any() or (values < 0.0).any():
            raise ValueError(
                f"levels: {name} must be finite and non-negative, got {values.min():g} to {values.max():g}"
            )
        return values

    return grid
