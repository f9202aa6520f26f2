"""Compiled coefficients against published formulas in 40 digits, and proof that no wrong coefficient would pass."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import solvers_textbook as book
from solvers_problems import lambda_levels

from fastdiff.process import VPLinear
from fastdiff.solvers import solver
from fastdiff.solvers.invariants import check_rows

PROCESS = VPLinear()
LONG = {"lower_order_below": 0}  # as in runs of 15 steps or more
# solver, options, textbook function, its arguments
CASES = {
    "ddim": ("ddim", {}, book.ancestral, {}),
    "ddim eta .7": ("ddim", {"eta": 0.7}, book.ancestral, {"eta": 0.7}),
    "ddim reference": ("ddim", {"clip": "reference", "eta": 0.7}, book.ancestral, {"eta": 0.7}),
    "ddpm": ("ddpm", {}, book.ancestral, {"eta": 1.0}),
    "ddpm large": ("ddpm", {"variance": "large"}, book.ancestral, {"eta": 1.0, "large": True}),
    "euler": ("euler", {}, book.euler_ancestral, {"eta": 0.0}),
    "euler-a": ("euler-a", {"eta": 0.8, "s_noise": 1.003}, book.euler_ancestral, {"eta": 0.8, "s_noise": 1.003}),
    "flow-euler": ("flow-euler", {}, book.flow_euler, {}),
    "dpm-2m": ("dpm-2m", {**LONG}, book.dpm, {"order": 2, "history": "noise"}),
    "dpm-2m heun": (
        "dpm-2m",
        {**LONG, "solver_type": "heun"},
        book.dpm,
        {"order": 2, "history": "noise", "kind": "heun"},
    ),
    "dpm-3m": ("dpm-3m", {**LONG}, book.dpm, {"order": 3, "history": "noise"}),
    "dpm-3m exact": ("dpm-3m", {**LONG, "third": "exact"}, book.dpm, {"order": 3, "history": "noise", "kappa": 2}),
    "dpmpp-1": ("dpmpp-1", {}, book.dpm, {"order": 1}),
    "dpmpp-2m": ("dpmpp-2m", {**LONG}, book.dpm, {"order": 2}),
    "dpmpp-2m heun": ("dpmpp-2m", {**LONG, "solver_type": "heun"}, book.dpm, {"order": 2, "kind": "heun"}),
    "dpmpp-3m short": ("dpmpp-3m", {}, book.dpm, {"order": 3, "falls": True}),
    "dpmpp-3m": ("dpmpp-3m", {**LONG}, book.dpm, {"order": 3}),
    "dpmpp-3m exact": ("dpmpp-3m", {**LONG, "third": "exact"}, book.dpm, {"order": 3, "kappa": 2}),
    "sde-dpmpp-1": ("sde-dpmpp-1", {}, book.dpm, {"order": 1, "eta": 1.0}),
    "sde-dpmpp-2m": ("sde-dpmpp-2m", {**LONG}, book.dpm, {"order": 2, "eta": 1.0}),
    "2m sde": ("dpmpp-2m-sde", {"eta": 0.6, "s_noise": 1.1}, book.dpm, {"order": 2, "eta": 0.6, "s_noise": 1.1}),
    "3m sde": ("dpmpp-3m-sde", {"eta": 0.6}, book.dpm, {"order": 3, "kind": "heun", "eta": 0.6}),
    **{
        f"exp-adams {p} {h}": ("exp-adams", {"order": p, "history": h}, book.adams, {"order": p, "history": h})
        for p, h in ((2, "noise"), (3, "data"), (4, "data"), (4, "noise"))
    },
    **{
        f"unipc {p} {b} {h}": (
            "unipc",
            {"order": p, "solver_type": b, "history": h, "disable_corrector": off, "lower_order_final": falls},
            book.unipc,
            {"order": p, "variant": b, "history": h, "uncorrected": off, "last_order_falls": falls},
        )
        for p, b, h, off, falls in (
            (1, "bh1", "data", (), True),
            (1, "bh2", "noise", (), True),
            (2, "bh1", "noise", (), True),
            (2, "bh2", "data", (0, 2), True),
            (3, "bh1", "data", (), False),
            (3, "bh2", "data", (), True),
            (3, "bh2", "noise", (1,), False),
        )
    },
    "unip 3": ("unipc", {"order": 3, "disable_corrector": "all"}, book.unipc, {"order": 3, "corrector": False}),
    **{
        f"sa {p} {c} {tau} {h}": (
            "sa",
            {"order": p, "corrector_order": c, "tau": tau, "history": h, "interval": (0.0, 9.0)},
            book.adams,
            {"order": p, "corrector": c, "tau": tau, "history": h, "falls": True, "last_deterministic": True},
        )
        for p, c, tau, h in ((2, 0, 1.0, "data"), (3, 4, 0.8, "data"), (2, 2, 1.0, "noise"), (1, 1, 0.5, "data"))
    },
    **{
        f"deis {p} {v}": ("deis", {"order": p, "variable": v}, book.deis, {"order": p, "variable": v})
        for p, v in ((2, "t"), (4, "t"), (3, "rho"))
    },
    "deis logrho": ("deis", {"order": 3, "variable": "logrho"}, book.adams, {"order": 3, "history": "noise"}),
    "lms": ("lms", {}, book.deis, {"order": 4, "variable": "rho"}),
    "pndm": ("pndm", {}, book.pseudo, {"start": "rk", "terms": 4}),
    "s-pndm": ("s-pndm", {}, book.pseudo, {"start": "euler", "terms": 2}),
    "plms": ("plms", {}, book.pseudo, {"start": "euler", "terms": 4}),
    "ipndm": ("ipndm", {}, book.pseudo, {"start": None, "terms": 4}),
    "bdia": ("bdia", {}, book.bdia, {}),
    "bdia .7": ("bdia", {"gamma": 0.7}, book.bdia, {"gamma": 0.7}),
}


def grid():
    """Six uneven steps, so that no node is where another method would have it too."""
    lam = np.array([-2.1, -1.45, -0.9, -0.1, 0.5, 1.3, 1.9])
    return lambda_levels(1, *lam[:2]), [lambda_levels(1, value, value + 1.0)[0] for value in lam]


@cache
def compiled(case):
    """(solver, rows, reference trace) of a case."""
    name, options, formula, arguments = CASES[case]
    levels, made = grid()[1], solver(name, **options)
    reference = book.Book(levels, PROCESS)
    final = formula(reference, reference.unit(0), **arguments)
    states = [np.array(state, dtype=np.float64) for state in (*reference.trace, final)]
    return made, made.rows(levels, PROCESS, **made.options), states


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_the_published_formulas(case):
    _, rows, states = compiled(case)
    assert book.disagreement(rows, states) <= 1.0


def wrong(value):
    """Other values that a coefficient might have by mistake."""
    return {value * (1.0 + 1e-9), value * (1.0 - 1e-9), value + 1e-9, -value, 0.0, value + 1.0} - {value}


def mutants(rows):
    """Every single-coefficient error of the rows: nudged, sign, zero, off by one, exchanged, moved to a neighbour, noise."""
    for r, row in enumerate(rows):
        edits = [{"A": v} for v in wrong(row.A)]
        for field in ("B", "X"):
            table = dict(getattr(row, field))
            edits += [{field: {**table, k: v}} for k in table for v in wrong(table[k])]
            if len(table) > 1:
                keys = list(table)
                for first, second in zip(keys[:-1], keys[1:], strict=True):
                    edits.append({field: {**table, first: table[second], second: table[first]}})
            for k in table:
                for other in (k - 1, k + 1):
                    if 0 <= other <= r and other not in table:
                        edits.append({field: {**{j: v for j, v in table.items() if j != k}, other: table[k]}})
        if row.R:
            edits += [{"R": v} for v in wrong(row.R)]
        for noise in row.noise:
            edits += [{"noise": (replace(noise, scale=v),)} for v in wrong(noise.scale)]
            edits.append({"noise": (replace(noise, step=noise.step + 1),)})
        for edit in edits:
            if any(getattr(row, key) != value for key, value in edit.items()):
                yield rows[:r] + [replace(row, **edit)] + rows[r + 1 :]


def survives_invariants(rows, made) -> bool:
    try:
        check_rows(rows, made.exact, made.history, tolerance=1e-12)
    except (ValueError, KeyError):
        return False
    return True


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES.values()}))
def test_no_wrong_coefficient_survives(name):
    total, alive, unseen_by_invariants = 0, [], 0
    for case in (case for case, entry in CASES.items() if entry[0] == name):
        made, rows, states = compiled(case)
        assert survives_invariants(rows, made) and book.disagreement(rows, states) <= 1.0
        for mutant in mutants(list(rows)):
            total += 1
            survives = survives_invariants(mutant, made)
            unseen_by_invariants += survives
            if survives and book.disagreement(mutant, states) <= 1.0:
                alive.append((case, mutant))
    print(f"{name}: {total} mutants, {len(alive)} alive, {unseen_by_invariants} caught by the formulas alone")
    assert total >= 60 and not alive
