"""Published update formulas in 40 digits, with every state kept apart: the independent side of the coefficient tests.

A book's states are linear in (x_T, h_0, h_1, ..., z_0, z_1, ...): calling the model returns the next unit vector, so two ways of
writing a solver are equal exactly if they hand the same states to the model.
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 40
SIZE, NOISE = 64, 40  # coordinates: 0 is x_T, 1 + r is the prediction of call r, NOISE + i the noise of step i


class Book:
    """Levels in high precision and the states that were handed to the model."""

    def __init__(self, levels, process=None):
        self.a, self.s, self.t = ([mp.mpf(getattr(v, key)) for v in levels] for key in ("alpha", "sigma", "t"))
        self.L = [mp.log(a / s) for a, s in zip(self.a, self.s, strict=True)]
        self.k = [s / a for a, s in zip(self.a, self.s, strict=True)]
        self.steps, self.process, self.trace = len(levels) - 1, process, []

    def unit(self, i):
        return np.array([mp.mpf(int(i == j)) for j in range(SIZE)])

    def call(self, x):
        self.trace.append(x)
        return self.unit(len(self.trace))

    def noise(self, i):
        return self.unit(NOISE + i)


def trace_of(rows):
    """States before each call and after the last, by executing rows in float64 on unit vectors."""
    eye = np.eye(SIZE)
    x, states = eye[0], []
    for r, row in enumerate(rows):
        states.append(x)
        x = row.A * x + row.R * eye[1 + r] + sum(v * eye[1 + k] for k, v in row.B.items())
        x = x + sum(v * states[k] for k, v in row.X.items()) + sum(n.scale * eye[NOISE + n.step] for n in row.noise)
    return [*states, x]


def disagreement(rows, reference) -> float:
    """Largest difference of coordinates, as a multiple of 1e-12 |coordinate| + 1e-14 max |state|."""
    states, worst = trace_of(rows), 0.0
    if len(states) != len(reference):
        return np.inf
    for got, want in zip(states, reference, strict=True):
        scale = 1e-12 * np.abs(want) + 1e-14 * np.abs(want).max()
        worst = max(worst, float(np.max(np.abs(got - want) / scale)))
    return worst


def ancestral(book, x, eta=0.0, clip="consistent", large=False):
    """DDPM and DDIM from cumulative products (Song et al. 2021, eq. 12 and 16)."""
    for i in range(book.steps):
        bar, bar_next = book.a[i] ** 2, book.a[i + 1] ** 2
        C = eta * mp.sqrt((1 - bar_next) / (1 - bar)) * mp.sqrt(1 - bar / bar_next)
        x0 = book.call(x)
        eps = (x - book.a[i] * x0) / book.s[i]
        mean = book.a[i + 1] * x0 + mp.sqrt(1 - bar_next - C**2) * eps
        x = mean + (mp.sqrt(1 - bar / bar_next) if large else C) * book.noise(i)
    return x


def euler_ancestral(book, x, eta=1.0, s_noise=1.0):
    """k-diffusion's form: states over alpha, noise levels kappa."""
    for i in range(book.steps):
        s, to = book.k[i], book.k[i + 1]
        up = min(to, eta * mp.sqrt(to**2 * (s**2 - to**2) / s**2))
        down = mp.sqrt(to**2 - up**2)
        y, D = x / book.a[i], book.call(x)
        x = book.a[i + 1] * (y + (down - s) * (y - D) / s + s_noise * up * book.noise(i))
    return x


def flow_euler(book, x):
    for i in range(book.steps):
        x = x + (book.t[i + 1] - book.t[i]) * book.call(x)
    return x


def dpm(book, x, order, history="data", kind="midpoint", kappa=1, eta=0.0, s_noise=1.0, falls=False):
    """Multistep DPM-Solver and DPM-Solver++ with the phi codes p1, p2, p3; eta and s_noise as in k-diffusion."""
    h_of = lambda i: book.L[i + 1] - book.L[i]
    past = []
    for i in range(book.steps):
        a, s, h, q = book.a[i + 1], book.s[i + 1], h_of(i), 1 + mp.mpf(eta)
        past = [book.call(x), *past][:3]
        n = min(order, len(past), book.steps - i if falls else order)
        if history == "data":
            p1 = mp.exp(-q * h) - 1
            p2 = p1 / (q * h) + 1
            p3 = p2 / (q * h) - mp.mpf(1) / 2
            new, c1, c2 = s / book.s[i] * mp.exp(-eta * h) * x - a * p1 * past[0], a * p2, -a * p3
            middle = -a * p1 / 2
        else:
            p1 = mp.exp(h) - 1
            p2 = p1 / h - 1
            p3 = p2 / h - mp.mpf(1) / 2
            new, c1, c2 = a / book.a[i] * x - s * p1 * past[0], -s * p2, -s * p3
            middle = -s * p1 / 2
        if n == 2:
            D1 = (past[0] - past[1]) / (h_of(i - 1) / h)
            new = new + (c1 if kind == "heun" else middle) * D1
        if n == 3:
            r0, r1 = h_of(i - 1) / h, h_of(i - 2) / h
            D10, D11 = (past[0] - past[1]) / r0, (past[1] - past[2]) / r1
            D1 = D10 + r0 / (r0 + r1) * (D10 - D11)
            new = new + c1 * D1 + c2 * kappa * (D10 - D11) / (r0 + r1)
        x = new + s_noise * s * mp.sqrt(1 - mp.exp(-2 * eta * h)) * book.noise(i)
    return x


def unipc(book, x, order, variant="bh2", history="data", last_order_falls=True, uncorrected=(), corrector=True):
    """UniPC with its linear systems R rho = b and two states (Zhao et al. 2023, alg. 1 and 2)."""
    past = [book.call(x)]
    for i in range(book.steps):
        p = min(order, i + 1, book.steps - i) if last_order_falls else min(order, i + 1)
        h = book.L[i + 1] - book.L[i]
        hh, m = (-h, book.a[i + 1]) if history == "data" else (h, book.s[i + 1])
        A = book.s[i + 1] / book.s[i] if history == "data" else book.a[i + 1] / book.a[i]
        Bh = hh if variant == "bh1" else mp.expm1(hh)
        phi = [mp.expm1(hh)]
        for j in range(1, p + 1):
            phi.append(phi[-1] / hh - 1 / mp.factorial(j))
        b = [mp.factorial(j) * phi[j] / Bh for j in range(1, p + 1)]
        nodes = [(book.L[i - k] - book.L[i]) / h for k in range(1, p)] + [mp.mpf(1)]
        D = [(past[k] - past[0]) / nodes[k - 1] for k in range(1, p)]
        rho_p = [mp.mpf(1) / 2] if p == 2 else _solve(nodes[: p - 1], b[: p - 1])
        rho_c = [mp.mpf(1) / 2] if p == 1 else _solve(nodes, b)
        base = A * x - m * phi[0] * past[0]
        predicted = base - m * Bh * sum((r * d for r, d in zip(rho_p, D, strict=True)), 0 * x)
        if i + 1 == book.steps:
            return predicted
        new = book.call(predicted)
        x = predicted
        if corrector and i not in uncorrected:
            x = base - m * Bh * sum((r * d for r, d in zip(rho_c, [*D, new - past[0]], strict=True)), 0 * x)
        past = [new, *past]


def _solve(nodes, b):
    if not nodes:
        return []
    R = mp.matrix(len(nodes), len(nodes))
    for i in range(len(nodes)):
        for j, node in enumerate(nodes):
            R[i, j] = node**i
    return list(mp.lu_solve(R, mp.matrix(b)))


def _lagrange(nodes, k):
    return lambda u: mp.fprod((u - other) / (nodes[k] - other) for j, other in enumerate(nodes) if j != k)


def adams(book, x, order, corrector=0, tau=0.0, history="data", falls=False, last_deterministic=False):
    """Stochastic Adams by quadrature of Lagrange polynomials in lambda, predictor and corrector with the same noise."""
    past, x = [(0, book.call(x))], x
    for i in range(book.steps):
        final = i + 1 == book.steps
        T = mp.mpf(0.0 if final and last_deterministic else tau)
        P = min(order, i + 1, book.steps - i) if falls else min(order, i + 1)
        C = min(corrector, i + 2, book.steps - i + 1) if falls else min(corrector, i + 2)
        h, q = book.L[i + 1] - book.L[i], 1 + T**2
        if history == "data":
            base = mp.exp(-(T**2) * h) * book.s[i + 1] / book.s[i] * x
            base = base + book.s[i + 1] * mp.sqrt(1 - mp.exp(-2 * T**2 * h)) * book.noise(i)
            kernel = lambda L: q * book.a[i + 1] * mp.exp(-q * (book.L[i + 1] - L))  # noqa: B023
        else:
            base = book.a[i + 1] / book.a[i] * x + T * book.s[i + 1] * mp.sqrt(mp.expm1(2 * h)) * book.noise(i)
            kernel = lambda L: -q * book.s[i + 1] * mp.exp(book.L[i + 1] - L)  # noqa: B023
        x = predicted = base + _integral(kernel, book.L[i], book.L[i + 1], past[:P], book.L)
        if final:
            return predicted
        new = (i + 1, book.call(predicted))
        if corrector:
            x = base + _integral(kernel, book.L[i], book.L[i + 1], [new, *past][:C], book.L)
        past = [new, *past]


def _integral(kernel, low, high, entries, places):
    nodes = [places[index] for index, _ in entries]
    total = 0
    for k, (_, value) in enumerate(entries):
        basis = _lagrange(nodes, k)
        total = total + mp.quad(lambda u: kernel(u) * basis(u), [low, high]) * value  # noqa: B023
    return total


def deis(book, x, order, variable="t"):
    """Integrals over kappa of Lagrange polynomials in t or kappa, by quadrature; t is VPLinear's."""
    past = []
    b0, d = mp.mpf(book.process.beta_min), mp.mpf(book.process.beta_max) - mp.mpf(book.process.beta_min)

    def slope(t):  # dkappa / dt, from kappa^2 = exp(d t^2 / 2 + b0 t) - 1
        e = mp.exp(d * t**2 / 2 + b0 * t)
        return (d * t + b0) * e / (2 * mp.sqrt(e - 1))

    places, kernel = (book.t, slope) if variable == "t" else (book.k, lambda u: 1)
    for i in range(book.steps):
        past = [(i, book.call(x)), *past][:order]
        x = book.a[i + 1] * (x / book.a[i] + _integral(kernel, places[i], places[i + 1], past, places))
    return x


def pseudo(book, x, start, terms):
    """PNDM family: DDIM transfer with averaged noise (Liu et al. 2022); start is "rk", "euler" or None."""
    past = []
    weights = {1: (1,), 2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}

    def move(x, eps, a, s, a2, s2):
        return a2 / a * x + (s2 - s * a2 / a) * eps

    for i in range(book.steps):
        here, there = (book.a[i], book.s[i]), (book.a[i + 1], book.s[i + 1])
        past = [book.call(x), *past][:terms]
        if start == "rk" and i < 3:
            mid = book.process.levels([float((book.t[i] + book.t[i + 1]) / 2)])[0]
            half = (mp.mpf(mid.alpha), mp.mpf(mid.sigma))
            e1 = past[0]
            e2 = book.call(move(x, e1, *here, *half))
            e3 = book.call(move(x, e2, *here, *half))
            e4 = book.call(move(x, e3, *here, *there))
            mean = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        elif start == "euler" and i == 0:
            mean = (past[0] + book.call(move(x, past[0], *here, *there))) / 2
        else:
            c = [mp.mpf(v) for v in weights[len(past)]]
            mean = sum(v * e for v, e in zip(c, past, strict=True)) / sum(c)
        x = move(x, mean, *here, *there)
    return x


def bdia(book, x, gamma=1.0):
    """x_next = gamma x_old - gamma DDIM(x to old) + DDIM(x to next)."""
    old = None
    for i in range(book.steps):
        x0 = book.call(x)
        eps = (x - book.a[i] * x0) / book.s[i]
        new = book.a[i + 1] * x0 + book.s[i + 1] * eps
        if i:
            new = new + gamma * (old - (book.a[i - 1] * x0 + book.s[i - 1] * eps))
        old, x = x, new
    return x
