"""Runs the linear layers at the level and thread count it is started with. See test_linear.py.

codes   compares int8 products with int64, prints a hash of every layer on int8 activations without an activation
bits    prints a hash of every layer on every sample
guard   runs every layer with each buffer before and behind a page that nobody may touch
"""

import json
import sys

import torch
from digest import digest, native_calls
from guard import Guarded

from fastdiff.ops import OPS, backend, linear_call, memory, native, packing

NAMES = ("linear", "linear_w8a8", "linear_w8a16", "linear_w4a16", "linear_w4a8")
SHAPES = ((1, 1, 1), (2, 4, 16), (3, 7, 33), (15, 130, 47), (29, 1153, 64), (300, 64, 96), (128, 4608, 48))


def products() -> dict[str, str]:
    """Sums of the largest and of random codes: exact, whatever the level."""
    hashes = {}
    for M, K, N in SHAPES:
        generator = torch.Generator().manual_seed(M)
        codes = lambda *shape, g=generator: torch.randint(-127, 128, shape, generator=g).to(torch.int8)
        ends = lambda *shape, g=generator: (127 * (2 * torch.randint(0, 2, shape, generator=g) - 1)).to(torch.int8)
        for x, w in ((codes(M, K), codes(N, K)), (ends(M, K), ends(N, K)), (ends(M, K), ends(1, K).expand(N, K))):
            one, ones = torch.ones(1), torch.ones(N)
            got = OPS["linear_w8a8"](
                x, one, packing.pack(w), ones, packing.weight_sums(w), N, None, "none", None, None, None, torch.float32
            )
            assert torch.equal(got, (x.long() @ w.long().T).float()), (M, K, N)
            hashes[f"w8a8 {M} {K} {N} {len(hashes)}"] = digest([got])
        K8 = -(-K // 8) * 8
        w = torch.randint(-8, 8, (N, K8), generator=generator).to(torch.int8)
        x, scale = torch.randn(M, K8, generator=generator), torch.rand(N, K8 // 8, generator=generator)
        got = OPS["linear_w4a8"](x, packing.pack_int4(w), scale, N, 8, None, "none", None, None, torch.float32)
        hashes[f"w4a8 {M} {K} {N}"] = digest([got])
    return hashes


def bits() -> dict[str, str]:
    return {name: digest([OPS[name](*args) for args in native_calls(OPS[name])]) for name in NAMES}


def guard() -> dict[str, int]:
    counts = {}
    for name in NAMES:
        for args in native_calls(OPS[name]):
            wanted = OPS[name](*args)
            for side in ("begin", "end"):
                fence = Guarded(side)
                linear_call.memory.empty = lambda shape, dtype, fence=fence: fence.empty(shape, dtype)
                got = OPS[name](*[fence.copy(a) for a in args])
                linear_call.memory.empty = plain
                assert torch.equal(got.nan_to_num(7), wanted.nan_to_num(7)), name
                fence.close()
                counts[name] = counts.get(name, 0) + 1
    return counts


plain = memory.empty

if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    with backend("cpu"):
        result = {"codes": products, "bits": bits, "guard": guard}[sys.argv[1]]()
    print(json.dumps({"isa": native.cpu().isa(), "result": result}))
