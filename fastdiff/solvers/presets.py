"""Presets: the options with which a solver takes the steps of a published code, where codes of the same name differ.

Only weights: noise levels are a matter of spacing, and `fastdiff.solvers.compat` translates a scheduler's whole config.
"""

from collections.abc import Mapping

from fastdiff.solvers.row import choose

_SHORT, _EVERY = (
    {"lower_order_below": 15},
    {"lower_order_below": 0},
)  # runs under 15 steps end with lower orders, or none does
_DIFFUSERS: dict[str, Mapping[str, object]] = {
    **dict.fromkeys(("ddpm", "euler", "euler-a", "heun", "dpm2", "dpm2-a", "lms", "plms", "ipndm"), {}),
    **dict.fromkeys(("dpmpp-1", "sde-dpmpp-1", "flow-euler", "flow-heun"), {}),
    **dict.fromkeys(("dpm-2m", "dpmpp-2m", "sde-dpmpp-2m"), _SHORT),
    **dict.fromkeys(("dpm-3m", "dpmpp-3m"), {**_SHORT, "third": "compat"}),
    "ddim": {"clip": "reference"},
    "dpm-fast": {"inner": "same"},
    "deis": {**_SHORT, "order": 2, "variable": "logrho"},
    "unipc": {"order": 2, "solver_type": "bh2", "lower_order_final": True},
    "sa": {"order": 2, "corrector_order": 2, "interval": (200.0, 800.0), "rescale": True},
    "lcm": {"boundary": (0.5, 10.0)},
    "tcd": {"gamma": 0.3},
}
_K_DIFFUSION: dict[str, Mapping[str, object]] = {
    **dict.fromkeys(("euler", "euler-a", "heun", "dpm2", "dpm2-a", "dpmpp-2s-a", "dpmpp-sde"), {}),
    "lms": {"order": 4},
    "dpm-fast": {"order": 3, "inner": "exact"},
    "dpmpp-2m": _EVERY,
    "dpmpp-2m-sde": {"solver_type": "midpoint"},
    "dpmpp-3m-sde": {"third": "compat"},
}
PRESETS: dict[str, dict[str, Mapping[str, object]]] = {"diffusers": _DIFFUSERS, "k-diffusion": _K_DIFFUSION}


def preset(name: str, compat: str | None) -> Mapping[str, object]:
    """The options of solver `name` under a key of PRESETS, none for None. Raises ValueError where that code has no such solver."""
    if compat is None:
        return {}
    table = choose("compat", compat, PRESETS)
    if name not in table:
        raise ValueError(f"solver {name!r}: {compat} has no such sampler; it has {', '.join(table)}")
    return table[name]
