"""Exponential-Adams rows: every multistep method in the half log signal-to-noise ratio is one small Vandermonde solve.

With q = 1 + tau^2 and h the step in lambda, the variation-of-constants formula reads

    data:   x' = exp(-tau^2 h) sigma'/sigma x + alpha' sum_k w_k h_k + sigma' sqrt(1 - exp(-2 tau^2 h)) z
    noise:  x' = alpha'/alpha x + q sigma' sum_k w_k h_k + tau sigma' sqrt(exp(2h) - 1) z

where sum_k w_k v_k^j = psi_j(z) for the nodes v_k = (lambda_k - lambda) / h, z = q h for data and z = -h for noise.
Published solvers differ in the nodes, and in simplified moments psi_1 and psi_2 (`SECOND`, `THIRD`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fastdiff.process import Level
from fastdiff.solvers.row import RISING, Noise, Row

# the first moment of two-term rules, from (psi_0, psi_1, z)
SECOND: dict[str, Callable[[float, float, float], float]] = {
    "heun": lambda psi0, psi1, z: psi1,
    "midpoint": lambda psi0, psi1, z: 0.5 * psi0,  # Lu et al. 2022
    "bh1": lambda psi0, psi1, z: 0.5 * z,  # Zhao et al. 2023, B(h) = h
    "bh2": lambda psi0, psi1, z: 0.5 * psi0,  # Zhao et al. 2023, B(h) = exp(h) - 1
}
# factor on the second moment of three-term rules: published implementations halve it, which makes them second order
THIRD = {"compat": 0.5, "exact": 1.0}
EXACT = frozenset({"data", "noise", "variance", "mean"})
_SERIES_TERMS = 22  # relative error below 1e-14 for |z| < 1


def psi(z: float, count: int) -> list[float]:
    """Moments psi_j(z) = z int_0^1 exp(-z (1 - v)) v^j dv for j < count, any sign of z."""
    if abs(z) >= 1.0:
        moments = [-math.expm1(-z)]
        for j in range(1, count):
            moments.append(1.0 - j / z * moments[-1])
        return moments
    moments = []
    for j in range(count):
        term = total = z / (j + 1)
        for m in range(1, _SERIES_TERMS):
            term *= -z / (j + m + 1)
            total += term
        moments.append(total)
    return moments


def solve_moments(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Weights w with sum_k w_k nodes_k^j = moments_j, by the Bjorck-Pereyra recursion (distinct nodes)."""
    w, last = list(moments), len(nodes) - 1
    for k in range(last):
        for i in range(last, k, -1):
            w[i] -= nodes[k] * w[i - 1]
    for k in range(last - 1, -1, -1):
        for i in range(k + 1, last + 1):
            w[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, last):
            w[i] -= w[i + 1]
    return w


@dataclass(frozen=True)
class Rule:
    """Which moments a method uses: the history type and its simplifications of the second and third order."""

    history: str = "data"
    second: str = "heun"
    third: str = "exact"

    def moments(self, z: float, count: int) -> list[float]:
        m = psi(z, count)
        if count == 2:
            m[1] = SECOND[self.second](m[0], m[1], z)
        if count == 3:
            m[2] *= THIRD[self.third]
        return m


@dataclass(frozen=True)
class Grid:
    """Noise levels and their half log signal-to-noise ratios, between which exponential steps are taken."""

    levels: Sequence[Level]
    lam: Sequence[float]

    def weights(self, r: int, count: int, rule: Rule, tau: float = 0.0, first: int | None = None) -> dict[int, float]:
        """Coefficients B on the predictions `first` (default r), first - 1, ... (`count` of them) for the step r -> r + 1.

        Predictions at infinite lambda or at a repeated node carry no information and are left out. A step of infinite h has
        order 1 in closed form; its corrector (first = r + 1) is undefined and comes back empty.
        """
        at, to, q = self.levels[r], self.levels[r + 1], 1.0 + tau**2
        h = self.lam[r + 1] - self.lam[r]
        if math.isinf(h):
            if first is not None:
                return {}
            return {r: to.alpha if rule.history == "data" else to.sigma - to.alpha / at.alpha * at.sigma}
        nodes: dict[int, float] = {}
        for k in range(r if first is None else first, -1, -1):
            v = (self.lam[k] - self.lam[r]) / h
            if len(nodes) == count:
                break
            if math.isfinite(v) and v not in nodes.values():
                nodes[k] = v
        z, scale = (q * h, to.alpha) if rule.history == "data" else (-h, q * to.sigma)
        w = solve_moments(list(nodes.values()), rule.moments(z, len(nodes)))
        return {k: scale * value for k, value in zip(nodes, w, strict=True)}

    def row(self, r: int, B: Mapping[int, float], history: str, tau: float = 0.0, s_noise: float = 1.0) -> Row:
        """The row of step r with weights B: its A and its noise are those of the variation-of-constants formula."""
        at, to = self.levels[r], self.levels[r + 1]
        h = self.lam[r + 1] - self.lam[r]
        if tau > 0.0 and h < 0.0:
            raise ValueError(RISING)
        if history == "data":
            A = to.sigma / at.sigma * (math.exp(-(tau**2) * h) if tau > 0.0 else 1.0)
            C = to.sigma * math.sqrt(-math.expm1(-2.0 * tau**2 * h)) if tau > 0.0 else 0.0
        else:
            A = to.alpha / at.alpha
            C = tau * to.sigma * math.sqrt(math.expm1(2.0 * h)) if tau > 0.0 else 0.0
        noise = (Noise(C * s_noise, r),) if C * s_noise > 0.0 else ()
        return Row(at, to, A, dict(B), noise=noise, step=r)


def exponential_grid(levels: Sequence[Level]) -> Grid:
    """The grid of these levels."""
    return Grid(levels, [_lam(level) for level in levels])


def _lam(level: Level) -> float:
    if level.sigma == 0.0:
        return math.inf
    return -math.inf if level.alpha == 0.0 else math.log(level.alpha / level.sigma)


def exponential_rows(
    levels: Sequence[Level],
    orders: Sequence[int],
    rule: Rule,
    taus: Sequence[float] | None = None,
    s_noise: float = 1.0,
) -> list[Row]:
    """Adams-Bashforth rows in lambda: step r uses its newest `orders[r]` predictions and noise level `taus[r]`."""
    grid = exponential_grid(levels)
    taus = [0.0] * len(orders) if taus is None else taus
    return [
        grid.row(r, grid.weights(r, order, rule, tau), rule.history, tau, s_noise)
        for r, (order, tau) in enumerate(zip(orders, taus, strict=True))
    ]


def fold_corrector(rows: Sequence[Row], corrections: Mapping[int, Mapping[int, float]]) -> list[Row]:
    """Merges predictor-corrector steps into rows that act on the predicted state alone.

    corrections[r] are the corrector's weights of step r, prediction r + 1 (made at the predicted state) included. The
    corrected state is the predicted one plus (corrector - predictor weights) on the history; the next row multiplies that by
    its A (Zhao et al. 2023, alg. 1 in one state). The weights of the rows must be the predictor's.
    """
    folded = list(rows)
    for r, corrector in corrections.items():
        if not corrector or r + 1 >= len(rows):
            continue
        after = rows[r + 1]
        change = {k: corrector.get(k, 0.0) - rows[r].B.get(k, 0.0) for k in {**corrector, **rows[r].B}}
        # both are exact on constants, so the changes sum to 0; the largest weight's own difference would lose digits
        largest = max(change, key=lambda k: abs(corrector.get(k, 0.0)))
        change[largest] = -math.fsum(value for k, value in change.items() if k != largest)
        B = {k: after.B.get(k, 0.0) + after.A * change.get(k, 0.0) for k in {**after.B, **change}}
        folded[r + 1] = replace(after, B={k: v for k, v in B.items() if v != 0.0})
    return folded


def falling_orders(steps: int, order: int, lower_order_below: int, euler_at_final: bool) -> list[int]:
    """Order of each step: rising 1, 2, ... at the start and, below a number of steps, falling at the end."""
    falls = steps < lower_order_below
    orders = [min(order, r + 1, steps - r if falls else order) for r in range(steps)]
    if euler_at_final:
        orders[-1] = 1
    return orders
