"""Numbers behind spacings: the published Align Your Steps tables and quantiles of the beta distribution."""

import math

import numpy as np

# noise levels of 10-step schedules (Sabour et al. 2024); the last is where they end
AYS = {
    "sd1": (14.6146, 6.4746, 3.8637, 2.6946, 1.8842, 1.3944, 0.9643, 0.6524, 0.3977, 0.1515, 0.0292),
    "sdxl": (14.6146, 6.3184, 3.7682, 2.1811, 1.3405, 0.8621, 0.5551, 0.3799, 0.2332, 0.1114, 0.0292),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """Quantiles of the beta distribution at p in [0, 1], by Newton's method within brackets."""
    if not (a > 0.0 and b > 0.0):
        raise ValueError(f"levels: the beta distribution needs positive parameters, got {a:g} and {b:g}")
    given = np.asarray(p, dtype=np.float64)
    p = np.where((given > 0.0) & (given < 1.0), given, 0.5)
    low, high, x = np.zeros_like(p), np.ones_like(p), np.full_like(p, 0.5)
    log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    for _ in range(60):
        excess = _beta_cdf(x, a, b, log_norm) - p
        low, high = np.where(excess > 0.0, low, x), np.where(excess > 0.0, x, high)
        newton = x - excess / np.exp((a - 1.0) * np.log(x) + (b - 1.0) * np.log1p(-x) + log_norm)
        last, x = x, np.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
        if np.all(np.abs(x - last) <= 1e-14 * x):
            break
    return np.where(given <= 0.0, 0.0, np.where(given >= 1.0, 1.0, x))


def _beta_cdf(x: np.ndarray, a: float, b: float, log_norm: float) -> np.ndarray:
    """Regularised incomplete beta function; the fraction converges fast on one side of the mean, symmetry gives the other."""
    near = x < (a + 1.0) / (a + b + 2.0)
    y, p, q = np.where(near, x, 1.0 - x), np.where(near, a, b), np.where(near, b, a)
    log_front = p * np.log(y) + q * np.log1p(-y) + log_norm
    tail = np.exp(log_front) / p * _fraction(y, p, q)
    return np.where(near, tail, 1.0 - tail)


def _fraction(y: np.ndarray, p: np.ndarray, q: np.ndarray, terms: int = 30) -> np.ndarray:
    """The continued fraction of the incomplete beta function, from its last term backwards."""
    value = np.ones_like(y)
    for m in range(terms, 0, -1):
        even = m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m))
        odd = -(p + m - 1) * (p + q + m - 1) * y / ((p + 2 * m - 2) * (p + 2 * m - 1))
        value = 1.0 + odd / (1.0 + even / value)
    return 1.0 / value
