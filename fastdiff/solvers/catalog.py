"""Looking solvers up by name: the table of contents is `fastdiff.solvers.SOLVERS`; a trailing number is an order."""

import difflib
import re

from fastdiff import solvers
from fastdiff.solvers.presets import preset
from fastdiff.solvers.row import Solver


def solver(name: str | Solver, *, compat: str | None = None, **options) -> Solver:
    """The solver called `name` (or given) with these options; "unipc-3" is "unipc" of order 3 where a solver has that option.

    compat  "diffusers" or "k-diffusion": the options of that code where they differ; given options go first

    Raises ValueError for an unknown name, listing the known ones, and for an unknown option.
    """
    if isinstance(name, Solver):
        if compat is not None:
            raise ValueError(f"solver {name.name}: compat={compat!r} needs the solver's name, not one with options")
        return name.with_options(**options)
    if not isinstance(name, str):
        raise TypeError(f"solver: a key of SOLVERS, a Solver or a SolverTable expected, got {name!r}")
    table = solvers.SOLVERS
    if name in table:
        return table[name].with_options(**{**preset(name, compat), **options})
    suffix = re.fullmatch(r"(.+)-(\d+)", name)
    if suffix and suffix[1] in table and "order" in table[suffix[1]].options:
        if "order" in options:
            raise ValueError(f"solver {name!r}: the name already says the order; drop order={options['order']!r}")
        return table[suffix[1]].with_options(**{**preset(suffix[1], compat), "order": int(suffix[2]), **options})
    close = difflib.get_close_matches(name, table, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown solver {name!r}{hint}; known are {', '.join(table)}")
