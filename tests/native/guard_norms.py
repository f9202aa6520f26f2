"""Runs the memory-bound ops with inputs and results that end or begin at a page nobody may touch."""

import sys

import torch
from guard import Guarded

from fastdiff.ops import OPS, memory

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 257)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def calls(name: str, n: int, dtype: torch.dtype):
    """Argument tuples whose innermost size is n."""
    normal = lambda *shape: torch.randn(shape).to(dtype)
    two = (normal(2, n), normal(2, n))
    if name == "copy":
        yield from ((normal(3, n), to) for to in FLOATS)
        yield from ((normal(2, n, 21), to) for to in FLOATS)
    elif name in ("norm_modulate", "norm_modulate_int8", "gated_norm_modulate"):
        more = () if name == "norm_modulate_int8" else (dtype,)
        added = (normal(2, 3, n), normal(2, n)) if name == "gated_norm_modulate" else ()
        yield (normal(2, 3, n), *added, "layer", normal(n), normal(n), 1e-5, *two, *more)
    elif name == "group_norm":
        vectors = (normal(n + 5), normal(n + 5), 1e-5, "silu", None, None)
        yield (normal(2, 3, 3, n), normal(2, 3, 3, 5), 1, *vectors, None, dtype)
        yield (normal(2, 3, 3, n), normal(2, 3, 3, 5), n + 5, *vectors, torch.tensor([0.1]), torch.int8)
    elif name == "group_norm_nchw":
        yield (normal(2, 3, n), 3, normal(3), normal(3), 1e-5, "silu", None, None, None, dtype)
    elif name in ("quantize_rows", "activate", "geglu"):
        kinds = {"quantize_rows": ((),), "activate": (("gelu",), ("silu",)), "geglu": (("geglu_tanh",),)}[name]
        yield from ((normal(3, 2 * n if name == "geglu" else n), *kind) for kind in kinds)
    elif name == "resample":
        yield from ((normal(1, 5, 3, n), kind) for kind in ("nearest2x", "average2x"))
    elif name == "qk_norm_rope":
        angles = (normal(3, 2 * n), normal(3, 2 * n))
        yield from ((normal(2, 3, 2, 2 * n), normal(2 * n), 1e-6, *angles, pairs, dtype) for pairs in (True, False))


def transposed(name: str, args: tuple) -> tuple:
    """Every other copy reads its input across."""
    return (args[0].transpose(-1, -2), *args[1:]) if name == "copy" and args[0].dim() == 3 else args


def main(names: list[str]) -> None:
    cases = 0
    for name in names:
        run = next(v for v in OPS[name].variants if v.name == "cpu").run
        for n in SIZES:
            for args in (args for dtype in FLOATS for args in calls(name, n, dtype)):
                for side in ("begin", "end"):
                    guarded = Guarded(side)
                    memory.empty = lambda shape, dtype, guarded=guarded: guarded.empty(shape, dtype)
                    run(*transposed(name, tuple(guarded.copy(a) for a in args)))
                    guarded.close()
                    cases += 1
    print(cases)


if __name__ == "__main__":
    main(sys.argv[1:])
