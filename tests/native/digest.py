"""Prints one hash per op and type of its results of what the CPU kernels compute: run it at several instruction sets and thread counts.

Arguments: threads, then names of ops (default: all).
"""

import collections
import copy
import hashlib
import json
import sys

import torch
from large_calls import large_calls

from fastdiff.ops import OPS, backend, native
from fastdiff.ops.solver_step_samples import make_call

LARGE = (
    {"shape": (2, 4, 96, 97), "noises": 2, "aux": True, "slots": 4},
    {"shape": (3, 5, 111, 64), "layout": "channels_last", "model": torch.bfloat16, "fields": ("C", 1)},
    {"shape": (1, 4, 120, 121), "state": torch.float64, "noises": 1, "fields": (1, "E"), "clamp": True},
)


def native_calls(op):
    """The op's samples that its CPU kernel serves."""
    return (args for args in op.samples("cpu") if not op.explain(*args)["cpu"])


def calls(op):
    """These, and some that are large enough for several threads."""
    yield from native_calls(op)
    yield from large_calls(op.name)
    if op.name == "solver_step":
        for options in LARGE:
            yield make_call(torch.Generator().manual_seed(1), "cpu", **options)
    if op.name == "gram":
        yield ([torch.randn(2, 3, 50_001, generator=torch.Generator().manual_seed(k)) for k in range(4)],)
    if op.name == "philox_normal":
        index = torch.arange(3)
        yield (index, index.int(), index.int() + 7, 40_003)


def run(op, args) -> list[torch.Tensor]:
    args = copy.deepcopy(args)
    with backend("cpu"):
        out = op(*args)
    if op.mutates:
        return [args[i] for i in op._mutated]
    return list(out) if isinstance(out, (list, tuple)) else [out]


def digest(tensors) -> str:
    """A hash of all bits; every NaN counts as the same one."""
    hasher = hashlib.sha256()
    for t in tensors:
        if t.is_floating_point():
            t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
        hasher.update(t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    hashes = {}
    for op in [OPS[name] for name in sys.argv[2:] or OPS]:
        if not any(v.name == "cpu" for v in op.variants):
            continue
        results = collections.defaultdict(list)
        for args in calls(op):
            out = run(op, args)
            results[f"{op.name} {str(out[0].dtype).removeprefix('torch.')}"] += out
        hashes |= {name: digest(tensors) for name, tensors in results.items()}
    print(json.dumps({"isa": native.cpu().isa(), "hashes": hashes}))


if __name__ == "__main__":
    main()
