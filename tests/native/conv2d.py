"""Runs the convolutions' samples on guarded memory (`guard`), or prints hashes of their results (`digest THREADS`)."""

import json
import sys

import torch
from digest import digest, native_calls
from guard import Guarded

from fastdiff.ops import OPS, backend, memory, native
from fastdiff.ops.conv2d_samples import make_call, make_int8_call

NAMES = ("conv2d", "conv2d_w8a8")
# large enough for several threads: sums that wait between chunks of k, groups of unequal width, pixels in halves
LARGE = (
    (2, 31, 27, 20, 0, 90, 3, 1, (1, 1, 1, 1), 1),
    (2, 13, 11, 300, 0, 70, 3, 1, (1, 1, 1, 1), 1),
    (1, 9, 9, 130, 70, 144, 3, 2, (1, 1, 1, 1), 2),
)


def calls(name: str):
    yield from native_calls(OPS[name])
    for seed, shape in enumerate(LARGE):
        if name == "conv2d":
            yield make_call(shape, seed=seed)
            yield make_call(shape, weights=torch.bfloat16, seed=seed)
        else:
            yield make_int8_call(shape, seed=seed)
            yield make_int8_call(shape, torch.int8, torch.int8, seed=seed)


def hashes() -> dict:
    with backend("cpu"):
        return {name: digest([OPS[name](*args) for args in calls(name)]) for name in NAMES}


def guard() -> int:
    """Each sample with every tensor at the end, then at the beginning of its memory; the number of calls."""
    count, usual = 0, memory.empty
    for name in NAMES:
        for args in calls(name):
            with backend("cpu"):
                want = OPS[name](*args)
            for side in ("begin", "end"):
                guarded = Guarded(side)
                memory.empty = lambda shape, dtype, guarded=guarded: guarded.empty(shape, dtype)
                with backend("cpu"):
                    got = OPS[name](*(guarded.copy(a) if isinstance(a, torch.Tensor) else a for a in args))
                assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)) if got.numel() else True
                memory.empty = usual
                del got
                guarded.close()
                count += 1
    return count


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        print(guard())
    else:
        torch.set_num_threads(int(sys.argv[2]))
        print(json.dumps({"isa": native.cpu().isa(), "hashes": hashes()}))
