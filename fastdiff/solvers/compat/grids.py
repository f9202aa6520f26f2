"""Noise schedules and time grids exactly as diffusers' scheduler settings define them (facts, re-derived per setting)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.process import Flow, Level, TrigFlow, VPDiscrete
from fastdiff.solvers.row import choose
from fastdiff.solvers.spacing_tables import beta_quantile

_NEARLY_ZERO = 2.0**-24  # what sigma-based schedulers put for a terminal alpha of zero


def alphas_cumprod(config: Mapping, zero_snr_floor: bool = False, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """[T] cumulative products of a scheduler config: in float32 as in diffusers, then widened to float64.

    zero_snr_floor  2^-24 instead of 0 at the end of a zero-terminal-SNR schedule (sigma-based schedulers)
    """
    T = int(config.get("num_train_timesteps", 1000))
    low, high = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    schedule, given = config.get("beta_schedule", "linear"), config.get("trained_betas")
    if given is not None:
        betas = torch.tensor(given, dtype=torch.float32)
    elif schedule == "linear":
        betas = torch.linspace(low, high, T, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(low**0.5, high**0.5, T, dtype=dtype) ** 2
    elif schedule == "squaredcos_cap_v2":
        bar = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = torch.tensor([min(1 - bar((i + 1) / T) / bar(i / T), 0.999) for i in range(T)], dtype=torch.float32)
    else:
        raise ValueError(
            f"diffusers_setup: unknown beta_schedule {schedule!r}; known are linear, scaled_linear, squaredcos_cap_v2"
        )
    if config.get("rescale_betas_zero_snr"):
        betas = _zero_terminal(betas)
    products = torch.cumprod(1.0 - betas, dim=0)
    if config.get("rescale_betas_zero_snr") and zero_snr_floor:
        products[-1] = _NEARLY_ZERO
    return products.double().numpy()


def _zero_terminal(betas: torch.Tensor) -> torch.Tensor:
    """Betas whose last cumulative product is 0 (Lin et al. 2024, alg. 1)."""
    root = (1.0 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


@dataclass(frozen=True, eq=False)
class LogSigmaVP(VPDiscrete):
    """VPDiscrete whose log kappa is linear between training steps and beyond; the model's time stays within 0..T-1."""

    def _log_kappa(self) -> np.ndarray:
        return 0.5 * (np.log1p(-self.alphas_cumprod) - np.log(self.alphas_cumprod))

    def schedule(self, t):
        table = self._log_kappa()
        low, high = table[1] - table[0], table[-1] - table[-2]
        t = np.asarray(t, dtype=np.float64)
        inside = np.interp(t, np.arange(table.size), table)
        log = inside + np.minimum(t, 0.0) * low + np.maximum(t - table.size + 1.0, 0.0) * high
        kappa = np.exp(log)
        alpha = 1.0 / np.sqrt(1.0 + kappa**2)
        return alpha, alpha * kappa

    def rates(self, t):
        t = np.asarray(t, dtype=np.float64)
        return np.zeros_like(t), np.zeros_like(t)  # no prediction type of these schedulers needs them

    def model_time(self, t):
        return np.clip(t, 0.0, self.alphas_cumprod.size - 1.0)

    def time_of_lam(self, lam):
        table, lam = self._log_kappa(), -np.asarray(lam, dtype=np.float64)
        t = np.interp(lam, table, np.arange(table.size))
        low, high = table[1] - table[0], table[-1] - table[-2]
        return t + np.minimum(lam - table[0], 0.0) / low + np.maximum(lam - table[-1], 0.0) / high


@dataclass(frozen=True, kw_only=True)
class UnitTrigFlow(TrigFlow):
    """TrigFlow whose model receives the angle in quarter turns, 0 to 1."""

    def model_time(self, t):
        return np.asarray(t, dtype=np.float64) / (np.pi / 2)


def vp_level(t: float, product: float) -> Level:
    """The level of a cumulative product; the model receives t."""
    return Level(t, math.sqrt(product), math.sqrt(1.0 - product), t)


def kappa_levels(kappas: np.ndarray, times: np.ndarray, last: float) -> list[Level]:
    """Variance-preserving levels of these kappa = sigma / alpha, ending at kappa = `last`."""
    levels = []
    for kappa, t in zip([*kappas, last], [*times, 0.0], strict=True):
        alpha = 1.0 / math.sqrt(1.0 + kappa**2)
        levels.append(Level(float(t), alpha, float(alpha * kappa), float(t)))
    return levels


def timesteps(config: Mapping, steps: int, spacing: str, extra: bool) -> np.ndarray:
    """[steps] falling times by the rule `spacing`; `extra` lays steps + 1 points and drops the last (DPM-type schedulers)."""
    T = int(config.get("num_train_timesteps", 1000))
    choose("timestep_spacing", spacing, ("linspace", "leading", "trailing"))
    if not 1 <= steps <= T:
        raise ValueError(f"diffusers_setup: steps must be 1 to {T}, got {steps}")
    if spacing == "linspace":
        return np.linspace(0.0, T - 1.0, steps + extra)[::-1][:steps]
    if spacing == "leading":
        ratio = T // (steps + extra)
        return (np.arange(steps + extra) * float(ratio))[::-1][:steps] + config.get("steps_offset", 0)
    return np.round(np.arange(T, 0, -T / steps)) - 1.0


def spaced_kappas(config: Mapping, kappas: np.ndarray, steps: int) -> np.ndarray | None:
    """Kappas of use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas between the ends of `kappas` (falling), or None."""
    high, low, ramp = float(kappas[0]), float(kappas[-1]), np.linspace(0.0, 1.0, steps)
    if config.get("use_karras_sigmas"):
        return karras(low, high, ramp)
    if config.get("use_exponential_sigmas"):
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    if config.get("use_beta_sigmas"):
        return low + beta_quantile(1.0 - ramp, 0.6, 0.6) * (high - low)
    return None


def karras(low: float, high: float, ramp: np.ndarray, rho: float = 7.0) -> np.ndarray:
    """Karras et al. 2022, eq. 5, at fractions `ramp` from high to low."""
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def log_interpolated_times(kappas: np.ndarray, process: VPDiscrete) -> np.ndarray:
    """Training steps of these kappas, linear in log kappa, clipped to the table."""
    table = -process.lam(np.arange(process.alphas_cumprod.size))
    return np.interp(np.log(kappas), table, np.arange(table.size))


def flow_levels(sigmas: np.ndarray, times: np.ndarray) -> list[Level]:
    """Rectified-flow levels of these sigmas, ending at zero noise."""
    made = Flow().levels(np.append(sigmas, 0.0))
    return [
        Level(v.t, v.alpha, v.sigma, float(t), v.alpha_rate, v.sigma_rate)
        for v, t in zip(made, [*times, 0.0], strict=True)
    ]


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Resolution shift of rectified flow (Esser et al. 2024, eq. 23)."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)
