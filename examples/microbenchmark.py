"""Times one op of fastdiff beside torch, interleaved: `python examples/microbenchmark.py`. `python -m fastdiff bench` does all ops."""

import statistics
import time

import torch
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.ops.packing import pack


def medians(seconds: float, **contenders) -> dict[str, float]:
    """Median microseconds of each contender; they take turns, so that all meet the same machine."""
    times = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


torch.manual_seed(0)
x, weight, bias = torch.randn(256, 512), torch.randn(512, 512) / 512**0.5, torch.randn(512)
packed = pack(weight)
ours = lambda: ops.linear(x, packed, 512, bias, "gelu_tanh", None, None, torch.float32)
theirs = lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh")
assert (ours() - theirs()).abs().max() < 1e-4, "first right, then fast"

for name, microseconds in medians(0.5, ours=ours, theirs=theirs).items():
    print(f"linear and GELU, [256, 512] x [512, 512], {name}: {microseconds:.0f} us")
