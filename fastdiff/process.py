"""Noise processes x_t = alpha x0 + sigma noise (+ mean u), and the one place where predictions are converted."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

# A prediction is a linear mix p x0 + q noise + r x; every conversion follows from these three numbers (float64).
PREDICTIONS = {
    "noise": lambda level: (0.0, 1.0, 0.0),
    "data": lambda level: (1.0, 0.0, 0.0),
    "v": lambda level: (-level.sigma, level.alpha, 0.0),  # Salimans and Ho 2022, eq. 10
    "flow": lambda level: (level.alpha_rate, level.sigma_rate, 0.0),  # dx/dt at fixed x0 and noise
    "score": lambda level: (0.0, -1.0 / level.sigma, 0.0),
    "edm": lambda level: _edm_raw(level),  # Karras et al. 2022, table 1: x0 = c_skip x + c_out F
    "trig": lambda level: (-level.sigma, level.alpha, 0.0),  # Lu and Song 2024: dx/dt of TrigFlow over sigma_data
}


@dataclass(frozen=True)
class Level:
    """One noise level: x = alpha x0 + sigma noise + mean u. Rates are time derivatives; `time` is what the model receives."""

    t: float
    alpha: float
    sigma: float
    time: float
    alpha_rate: float = 0.0
    sigma_rate: float = 0.0
    mean: float = 0.0
    sigma_data: float = 1.0

    @property
    def lam(self) -> float:
        """Half the log signal-to-noise ratio, log(alpha / sigma); infinite at sigma = 0."""
        if self.sigma == 0.0:
            return np.inf
        return -np.inf if self.alpha == 0.0 else float(np.log(self.alpha / self.sigma))

    @property
    def kappa(self) -> float:
        """sigma / alpha: the noise level in the frame where alpha is 1."""
        return np.inf if self.alpha == 0.0 else self.sigma / self.alpha


def convert(prediction: str | tuple[float, float, float], to: str, level: Level) -> tuple[float, float, float]:
    """Coefficients (a, b, d) with `to` = a x + b m + d u for a network output m of type `prediction`, in float64.

    `prediction` is a key of PREDICTIONS or a triple (p, q, r) meaning m = p x0 + q noise + r x.
    Raises ValueError where the level makes it impossible, as noise prediction at alpha = 0.
    """
    if prediction == to:
        return 0.0, 1.0, 0.0
    p, q, r = _mix(prediction, level)
    a, s, n = level.alpha, level.sigma, level.mean
    determinant = p * s - q * a  # m and x as functions of (x0, noise)
    if abs(determinant) < 1e-300:
        raise ValueError(
            f"convert: a {prediction!r} output says nothing about x0 at alpha={a:g}, sigma={s:g}; "
            "start below the terminal noise level or use a data or v model"
        )
    data = (-(q + r * s) / determinant, s / determinant, q * n / determinant)
    if to == "data":
        return data
    noise = ((p + r * a) / determinant, -a / determinant, -p * n / determinant)
    P, Q, R = _mix(to, level)
    a, b, d = (P * x0 + Q * e for x0, e in zip(data, noise, strict=True))
    return a + R, b, d


def _mix(prediction: str | tuple[float, float, float], level: Level) -> tuple[float, float, float]:
    if isinstance(prediction, str):
        if prediction not in PREDICTIONS:
            raise ValueError(f"convert: unknown prediction {prediction!r}; known are {', '.join(PREDICTIONS)}")
        return PREDICTIONS[prediction](level)
    return prediction


def _edm_raw(level: Level) -> tuple[float, float, float]:
    s, d = level.sigma / level.alpha, level.sigma_data
    norm = np.hypot(s, d)
    c_skip, c_out = d**2 / norm**2, s * d / norm
    return 1.0 / c_out, 0.0, -c_skip / (c_out * level.alpha)


@dataclass(frozen=True, kw_only=True)
class Process:
    """A forward process. Subclasses give `schedule(t) -> (alpha, sigma)`; everything is float64.

    t_max   where sampling starts by default; t_min where it ends if it does not end at zero noise
    """

    t_max: float = 1.0
    t_min: float = 1e-3
    sigma_data: float = 1.0

    def schedule(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at times t."""
        raise TypeError(f"{type(self).__name__} must define schedule(t)")

    def rates(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Time derivatives of alpha and sigma, by complex-safe central differences unless a subclass knows better."""
        h = 1e-6 * max(self.t_max, 1e-12)
        low, high = np.clip(t - h, 0.0, self.t_max), np.clip(t + h, 0.0, self.t_max)
        (a0, s0), (a1, s1) = self.schedule(low), self.schedule(high)
        return (a1 - a0) / (high - low), (s1 - s0) / (high - low)

    def model_time(self, t: np.ndarray) -> np.ndarray:
        """What the network receives as its time input."""
        return np.asarray(t, dtype=np.float64)

    def mean(self, t: np.ndarray) -> np.ndarray:
        """Weight of the known endpoint u (zero for ordinary diffusion)."""
        return np.zeros_like(np.asarray(t, dtype=np.float64))

    def input_scale(self, level: Level) -> float:
        """Factor on the state before it enters the network."""
        return 1.0

    def lam(self, t: np.ndarray) -> np.ndarray:
        """Half log signal-to-noise ratio."""
        alpha, sigma = self.schedule(np.asarray(t, dtype=np.float64))
        with np.errstate(divide="ignore"):
            return np.log(alpha) - np.log(sigma)

    def time_of_lam(self, lam: np.ndarray) -> np.ndarray:
        """Inverse of `lam`, by bisection to float64 precision unless a subclass has a closed form."""
        lam = np.asarray(lam, dtype=np.float64)
        low, high = np.zeros_like(lam), np.full_like(lam, self.t_max)
        for _ in range(200):
            middle = 0.5 * (low + high)
            later = self.lam(middle) > lam
            low, high = np.where(later, middle, low), np.where(later, high, middle)
        return 0.5 * (low + high)

    def levels(self, t: np.ndarray) -> list[Level]:
        """The noise levels at times t."""
        t = np.asarray(t, dtype=np.float64)
        columns = (t, *self.schedule(t), self.model_time(t), *self.rates(t), self.mean(t))
        return [Level(*(float(v) for v in row), sigma_data=self.sigma_data) for row in zip(*columns, strict=True)]

    def zero_noise(self) -> Level:
        """The level of clean data, where a trajectory ends."""
        return Level(0.0, 1.0, 0.0, 0.0, sigma_data=self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class VPLinear(Process):
    """Variance-preserving process with beta(t) linear in t (Song et al. 2021); the model receives 1000 t or similar.

    time_scale  factor from t in [0, 1] to the model's time input
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_scale: float = 999.0

    def _log_alpha(self, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def schedule(self, t):
        log_alpha = self._log_alpha(t)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2.0 * log_alpha))

    def rates(self, t):
        alpha, sigma = self.schedule(t)
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        with np.errstate(divide="ignore"):
            return -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma

    def model_time(self, t):
        return np.asarray(t, dtype=np.float64) * self.time_scale

    def time_of_lam(self, lam):
        L, d = np.logaddexp(0.0, -2.0 * np.asarray(lam, dtype=np.float64)), self.beta_max - self.beta_min
        return 2.0 * L / (np.sqrt(self.beta_min**2 + 2.0 * d * L) + self.beta_min)


@dataclass(frozen=True, kw_only=True)
class SubVP(VPLinear):
    """Sub-variance-preserving process: sigma = 1 - alpha^2 (Song et al. 2021, eq. 17)."""

    def schedule(self, t):
        log_alpha = self._log_alpha(t)
        return np.exp(log_alpha), -np.expm1(2.0 * log_alpha)

    def rates(self, t):
        alpha, _ = self.schedule(t)
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -0.5 * beta * alpha, beta * alpha**2

    time_of_lam = Process.time_of_lam


@dataclass(frozen=True, kw_only=True)
class VPCosine(Process):
    """Cosine schedule (Nichol and Dhariwal 2021, eq. 17) in continuous time, offset s = 0.008."""

    t_max: float = 0.9946
    s: float = 0.008
    time_scale: float = 1000.0

    def _angle(self, t):
        return (t + self.s) / (1.0 + self.s) * (np.pi / 2.0)

    def schedule(self, t):
        alpha = np.cos(self._angle(t)) / np.cos(self._angle(0.0))
        return alpha, np.sqrt((1.0 - alpha) * (1.0 + alpha))

    def model_time(self, t):
        return np.asarray(t, dtype=np.float64) * self.time_scale


@dataclass(frozen=True, eq=False, kw_only=True)
class VPDiscrete(Process):
    """Variance-preserving process given by its cumulative products at training steps 0..T-1; t is the training step.

    alphas_cumprod  [T] float64, decreasing in (0, 1]. Between steps log alpha is linear in t.
    """

    alphas_cumprod: np.ndarray = field(default_factory=lambda: discrete_alphas("linear"))
    t_max: float = -1.0
    t_min: float = 0.0

    def __post_init__(self):
        table = np.asarray(self.alphas_cumprod, dtype=np.float64)
        if (
            table.ndim != 1
            or table.size < 2
            or not np.all((table >= 0.0) & (table <= 1.0))
            or np.any(np.diff(table) >= 0)
        ):
            raise ValueError("VPDiscrete: alphas_cumprod must be a strictly decreasing vector in [0, 1]")
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "t_max", float(table.size - 1))

    @cached_property
    def _log_alpha(self) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return 0.5 * np.log(self.alphas_cumprod)

    def schedule(self, t):
        log_alpha = np.interp(t, np.arange(self.alphas_cumprod.size), self._log_alpha)
        return np.exp(log_alpha), np.sqrt(-np.expm1(2.0 * log_alpha))

    def time_of_lam(self, lam):
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * np.asarray(lam, dtype=np.float64))
        return np.interp(-log_alpha, -self._log_alpha, np.arange(self.alphas_cumprod.size, dtype=np.float64))


def discrete_alphas(schedule: str, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> np.ndarray:
    """Cumulative products of the usual training schedules, [steps] float64: "linear", "scaled_linear" or "cosine"."""
    if schedule == "cosine":
        t = np.arange(steps + 1, dtype=np.float64) / steps
        bar = np.cos((t + 0.008) / 1.008 * np.pi / 2.0) ** 2
        betas = np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)
    elif schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    elif schedule == "linear":
        betas = np.linspace(beta_start, beta_end, steps)
    else:
        raise ValueError(f"discrete_alphas: unknown schedule {schedule!r}; known are linear, scaled_linear, cosine")
    return np.exp(np.cumsum(np.log1p(-betas)))


@dataclass(frozen=True, kw_only=True)
class VE(Process):
    """Variance-exploding process in the EDM frame: alpha = 1, sigma = t (Karras et al. 2022).

    The model receives c_noise = log(t) / 4 and its input is scaled by 1 / sqrt(sigma^2 + sigma_data^2) when `edm`, else t and 1.
    """

    t_max: float = 80.0
    t_min: float = 0.002
    sigma_data: float = 0.5
    edm: bool = True

    def schedule(self, t):
        t = np.asarray(t, dtype=np.float64)
        return np.ones_like(t), t.copy()

    def rates(self, t):
        t = np.asarray(t, dtype=np.float64)
        return np.zeros_like(t), np.ones_like(t)

    def model_time(self, t):
        with np.errstate(divide="ignore"):
            return 0.25 * np.log(t) if self.edm else np.asarray(t, dtype=np.float64)

    def input_scale(self, level):
        return 1.0 / float(np.hypot(level.sigma, self.sigma_data)) if self.edm else 1.0

    def time_of_lam(self, lam):
        return np.exp(-np.asarray(lam, dtype=np.float64))


@dataclass(frozen=True, kw_only=True)
class Flow(Process):
    """Rectified flow: x_t = (1 - t) x0 + t noise; the model receives time_scale * t.

    Resolution shifts (SD3, FLUX) move the time grid, not the process: see `fastdiff.solvers.spacing`.
    """

    time_scale: float = 1000.0

    def schedule(self, t):
        t = np.asarray(t, dtype=np.float64)
        return 1.0 - t, t.copy()

    def rates(self, t):
        t = np.asarray(t, dtype=np.float64)
        return -np.ones_like(t), np.ones_like(t)

    def model_time(self, t):
        return np.asarray(t, dtype=np.float64) * self.time_scale

    def time_of_lam(self, lam):
        return 1.0 / (1.0 + np.exp(np.asarray(lam, dtype=np.float64)))


@dataclass(frozen=True, kw_only=True)
class TrigFlow(Process):
    """TrigFlow: x_t = cos(t) x0 + sin(t) noise for t in [0, pi/2], data scaled to unit deviation (Lu and Song 2024)."""

    t_max: float = float(np.pi / 2)

    def schedule(self, t):
        return np.cos(t), np.sin(t)

    def rates(self, t):
        return -np.sin(t), np.cos(t)

    def time_of_lam(self, lam):
        return np.arctan(np.exp(-np.asarray(lam, dtype=np.float64)))


@dataclass(frozen=True, kw_only=True)
class MeanReverting(Process):
    """x_t = alpha x0 + (1 - alpha) u + sigma noise: data drift to a known endpoint u (Luo et al. 2023; MR sampler).

    base   the process whose alpha is used; sigma = sigma_max sqrt(1 - alpha^2)
    """

    base: Process = field(default_factory=VPLinear)
    sigma_max: float = 1.0

    def schedule(self, t):
        alpha, _ = self.base.schedule(t)
        return alpha, self.sigma_max * np.sqrt((1.0 - alpha) * (1.0 + alpha))

    def mean(self, t):
        return 1.0 - self.schedule(t)[0]

    def model_time(self, t):
        return self.base.model_time(t)
